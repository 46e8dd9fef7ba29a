"""Ways of keeping saved inputs, for themselves and between model-parallel ranks."""

import pytest
import torch
import torch.distributed as dist
from harness import on_ranks, run_on_ranks
from layers import LAYERS, WIDTH, Stack, assert_same, batch, gradients_of, unconfigured
from torch._subclasses.fake_tensor import FakeTensorMode

from deepspeed.activation_checkpointing import checkpointing
from deepspeed.activation_checkpointing.stores import Contiguous, Host, Partition
from deepspeed.errors import UsageError


@pytest.mark.parametrize("make", [Host, lambda: Contiguous(2, on_host=True)], ids=["Host", "Contiguous"])
def test_inputs_of_a_device_go_to_host_memory_and_come_back(make):
    with FakeTensorMode():
        tensor = torch.empty(3, 4, device="cuda").t()
        kept, undo = make().put(tensor, 0)
        assert kept.device.type == "cpu"
        back = undo(kept)
    assert back.device == tensor.device
    assert back.shape == tensor.shape
    assert back.stride() == tensor.stride()


class Unit:
    """A model-parallel unit of all ranks, or of neighbours two by two, under the names old and new."""

    def __init__(self, name="tensor_model_parallel", pairs=False):
        self.data = dist.group.WORLD
        self.model = dist.group.WORLD
        if pairs:
            self.model, _ = dist.new_subgroups_by_enumeration([[0, 1], [2, 3]])
            self.data, _ = dist.new_subgroups_by_enumeration([[0, 2], [1, 3]])
        setattr(self, f"get_{name}_group", lambda: self.model)

    def get_data_parallel_group(self):
        return self.data


@on_ranks(3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_each_rank_keeps_its_share_of_an_input(dtype):
    store = Partition(dist.group.WORLD)
    for shape in ((3, 4), (2,), (7,), (), (0,), (1, 1)):
        whole = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        for tensor in (whole, whole.t() if whole.dim() == 2 else whole):
            kept, undo = store.put(tensor, 0)
            assert kept.untyped_storage().nbytes() == -(-tensor.numel() // 3) * tensor.element_size()
            assert torch.equal(undo(kept), tensor)
            assert undo(kept).stride() == tensor.stride()


WAYS = {
    "partition": {},
    "on host": {"checkpoint_in_cpu": True},
    "contiguous": {"contiguous_checkpointing": True, "num_checkpoints": LAYERS},
    "all": {"contiguous_checkpointing": True, "num_checkpoints": LAYERS, "checkpoint_in_cpu": True},
}


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", ["model_parallel", "tensor_model_parallel"])
@pytest.mark.parametrize("way", WAYS)
def test_partitioned_gradients_are_those_of_plain_pytorch(ranks, name, way):
    run_on_ranks(ranks, partitioned, name, way)


def partitioned(name, way):
    with unconfigured():
        checkpointing.configure(Unit(name), partition_activations=True, **WAYS[way])
        assert isinstance(checkpointing._settings.stores[0], Partition)
        expected = gradients_of(Stack())
        model = Stack(checkpointing.checkpoint)
        for _ in range(2):
            assert_same(gradients_of(model), expected)
        assert_same(gradients_of(model, keep=True), expected)
        loss = model(batch(1))
        assert all(storage.expired() for storage in model.storages)
        loss.backward()


@on_ranks(2)
def test_inputs_that_differ_between_ranks_are_named():
    with unconfigured():
        checkpointing.configure(Unit(), partition_activations=True)
        own = batch(0, dist.get_rank()).requires_grad_()
        with pytest.raises(UsageError, match=r"same on all 2 .* got others in input 1 of shape \(5, 6\)"):
            checkpointing.checkpoint(lambda x, y: x @ y.t(), torch.ones(2, WIDTH), own)


@on_ranks(2)
def test_integers_and_booleans_may_differ_between_ranks():
    with unconfigured():
        checkpointing.configure(Unit(), partition_activations=True)
        source, rank = batch(0).requires_grad_(), dist.get_rank()
        mask = torch.arange(WIDTH) % 2 == rank
        checkpointing.checkpoint(lambda x, m, n: x * m * n, source, mask, torch.tensor(rank)).sum().backward()
        assert torch.equal(source.grad, (mask * rank).float().expand(5, WIDTH))


@on_ranks(2)
def test_model_parallel_streams_differ_and_the_common_one_does_not():
    with unconfigured():
        checkpointing.configure(Unit())
        checkpointing.model_parallel_cuda_manual_seed(7)
        with checkpointing.get_cuda_rng_tracker().fork():
            own = torch.rand(3)
        common = torch.rand(3)
        for ours, is_same in ((own, False), (common, True)):
            both = [torch.empty(3) for _ in range(2)]
            dist.all_gather(both, ours)
            assert torch.equal(*both) is is_same


@on_ranks(1)
def test_one_model_parallel_rank_keeps_everything():
    with unconfigured():
        checkpointing.configure(Unit(), partition_activations=True)
        assert checkpointing._settings.stores == []
