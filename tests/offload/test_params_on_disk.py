"""Parameters off the device: training, evaluation and edits are what they are beside it."""

from __future__ import annotations

import copy
import gc
import tempfile
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from collectives import gathers_are_collectives
from harness import run_on_ranks
from places import host_apart, parameters_apart
from torch import nn
from toys import make_toy, toy_batch
from training import TOLERANCE, assert_equal_training, config_for, drive_engine, train_both
from twins import Twins

import deepspeed
from deepspeed.errors import ConfigError, OffloadError
from deepspeed.offload.swap import SwapFolder
from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param, safe_set_local_fp32_param
from deepspeed.zero import GatheredParameters

BF16 = 2


def in_folder(ranks, body, *options):
    """Run `body(folder, *options)` on ranks; nothing is left in the folder afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        run_on_ranks(ranks, in_it, body, folder, *options)
        assert not list(Path(folder).iterdir())


def in_it(body, folder, *options):
    body(folder, *options)
    gc.collect()


def on_disk(folder, **options):
    return {"device": "nvme", "nvme_path": folder, "max_in_cpu": 0, **options}


# -- training -------------------------------------------------------------------------------------


def parity(folder, precision, gas, model, zero, collectives=False, **options):
    zero = {"offload_param": on_disk(folder, **options), **zero}
    config = config_for(3, precision, gas, 0.1, **zero)
    with ExitStack() as stack:
        if collectives:
            stack.enter_context(gathers_are_collectives())
        engine, plain = train_both(config, precision=precision, model=model)
        assert engine.memory_report().on_disk > 0
        assert_equal_training(engine, plain, TOLERANCE[precision])
        engine.destroy()


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize(("precision", "gas"), [("fp32", 1), ("bf16", 3), ("fp16", 2)])
def test_training_equals_plain_pytorch(ranks, precision, gas):
    in_folder(ranks, parity, precision, gas, {}, {})


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_with_states_on_disk_too_equals_plain_pytorch(ranks, precision):
    in_folder(ranks, parity_with_states, precision)


def parity_with_states(folder, precision):
    states = {"offload_optimizer": {"device": "nvme", "nvme_path": folder}, "sub_group_size": 16}
    parity(folder, precision, 2, {}, states)


@pytest.mark.parametrize(
    "model",
    [{"tied": True, "frozen": True}, {"checkpointing": "reentrant", "unused": True}],
    ids=lambda model: "+".join(model),
)
def test_shapes_of_models(model):
    in_folder(2, parity, "bf16", 2, model, {})


def test_gathers_that_are_collectives():
    in_folder(2, parity, "bf16", 2, {}, {}, True)


def some_in_memory(folder):
    parity(folder, "bf16", 1, {}, {}, max_in_cpu=64)
    config = config_for(3, "bf16", 1, 0.1, offload_param=on_disk(folder, max_in_cpu=64))
    engine, *_ = deepspeed.initialize(model=make_toy(), config=config)
    kept = sum(unit.held.nbytes for unit in engine.optimizer.units)
    assert 0 < kept <= 64 * BF16
    assert kept == engine.memory_report().parameters
    engine.destroy()


def test_the_first_units_stay_in_memory_up_to_max_in_cpu():
    in_folder(2, some_in_memory)


def test_experts_that_ranks_choose_differently():
    in_folder(2, experts_on_disk)


class Experts(nn.Module):
    """Each row goes to the layer that it names."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, hidden):
        rows = [self.experts[int(row[0] * 3) % 4](row).tanh() for row in hidden]
        return torch.stack(rows)


def experts_on_disk(folder):
    torch.manual_seed(0)
    twins = Twins(Experts(), lr=0.02, offload_param=on_disk(folder))
    for step in range(4):

        def loss_of(model, rank, step=step):
            rows = torch.randn(1 + rank, 8, generator=torch.Generator().manual_seed(10 * step + rank))
            return model(model(rows)).square().mean()

        twins.step(loss_of)
    twins.finish()
    twins.engine.destroy()


def parity_in_host_memory(precision, states):
    zero = {"offload_param": {"device": "cpu"}}
    with ExitStack() as stack:
        stack.enter_context(parameters_apart())
        if states:
            stack.enter_context(host_apart())
            zero["offload_optimizer"] = {"device": "cpu"}
        engine, plain = train_both(config_for(3, precision, 2, 0.1, **zero), precision=precision)
        assert_equal_training(engine, plain, TOLERANCE[precision])
        engine.destroy()


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("states", [False, True])
def test_parameters_in_the_memory_of_the_host_beside_a_device(ranks, precision, states):
    run_on_ranks(ranks, parity_in_host_memory, precision, states)


# -- evaluation -----------------------------------------------------------------------------------


WIDTH, LAYERS = 64, 12


def stack(seed):
    torch.manual_seed(seed)
    return nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)])


def inference(folder):
    layer = WIDTH * WIDTH * BF16
    zero = {
        "stage": 3,
        "offload_param": on_disk(folder),
        "stage3_param_persistence_threshold": 0,
        "stage3_prefetch_bucket_size": WIDTH * WIDTH,
    }
    config = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_optimization": zero}
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = stack(0)
    assert not any(param.ds_slot.unit.flat.untyped_storage().nbytes() for param in model.parameters())
    engine, *_ = deepspeed.initialize(model=model, config=config)
    plain = stack(1).bfloat16()
    plain.load_state_dict(engine.module_state_dict())
    hidden = torch.randn(3, WIDTH, dtype=torch.bfloat16)
    for _ in range(3):
        with torch.no_grad():
            assert torch.equal(engine(hidden), plain(hidden))
    report = engine.memory_report()
    assert report.parameters == report.gathered == 0
    assert report.on_disk * dist.get_world_size() == LAYERS * layer
    assert layer <= report.peak_gathered <= 2 * layer  # the one in use, and the next
    engine.destroy()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_model_larger_than_memory_is_born_on_disk_and_evaluated(ranks):
    in_folder(ranks, inference)


def born_elsewhere_than_configured(folder):
    config = config_for(3, "bf16", 1, 0.5, offload_param=on_disk(folder))
    with deepspeed.zero.Init(config_dict_or_path=config, remote_device="none"):
        model = make_toy()
    assert not list(Path(folder).iterdir())
    with deepspeed.zero.Init(config_dict_or_path=config, remote_device="nvme"):
        other = make_toy()
    assert list(Path(folder).iterdir())
    del model, other


def test_remote_device_counts_more_than_the_configuration():
    in_folder(1, born_elsewhere_than_configured)


# -- reading and changing -------------------------------------------------------------------------


def the_same_edits(engine):
    """Change parameters in every way there is; return what each way of reading them gives."""
    model = engine.module
    params = list(model.parameters())
    with GatheredParameters(params[0], modifier_rank=0):
        if dist.get_rank() == 0:
            params[0].data.mul_(2)
    with GatheredParameters(params):
        params[1].data.add_(1)
    safe_set_full_fp32_param(params[2], torch.full(params[2].shape, 0.3))
    piece = params[3].ds_slot.my_piece()
    safe_set_local_fp32_param(params[3], torch.full((0 if piece is None else piece.numel,), 0.7))
    drive_engine(engine, [toy_batch(0, 0, dist.get_rank())])
    values = [param.ds_tensor.clone() for param in params]
    values += [safe_get_full_fp32_param(param) for param in params]
    values += list(engine.module_state_dict().values())
    with GatheredParameters(params):
        values += [param.clone() for param in copy.deepcopy(model).parameters()]
    return values


def edits(folder):
    results = []
    for offload in ({"device": "none"}, on_disk(folder)):
        config = config_for(3, "bf16", 1, 0.5, offload_param=offload)
        engine, *_ = deepspeed.initialize(model=make_toy(), config=config)
        results.append(the_same_edits(engine))
        engine.destroy()
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("ranks", [1, 2])
def test_parameters_on_disk_are_read_and_changed_like_those_in_memory(ranks):
    in_folder(ranks, edits)


def resized(folder):
    config = config_for(3, "fp32", 1, 0.5, offload_param=on_disk(folder))
    with deepspeed.zero.Init(config_dict_or_path=config):
        table = nn.Embedding(5, 4)
    with GatheredParameters(table.weight, modifier_rank=0):
        before = table.weight.detach().clone()
        table.weight.data = torch.cat([before, torch.ones(2, 4)])
    engine, *_ = deepspeed.initialize(model=table, config=config)
    with GatheredParameters(table.weight):
        assert torch.equal(table.weight, torch.cat([before, torch.ones(2, 4)]))
    engine.destroy()


def test_a_parameter_born_on_disk_may_take_another_size():
    in_folder(2, resized)


# -- failures -------------------------------------------------------------------------------------


def loses_its_file(folder, train):
    config = config_for(3, "bf16", 1, 0.5, offload_param=on_disk(folder))
    engine, *_ = deepspeed.initialize(model=make_toy(), config=config)
    dist.barrier()
    if dist.get_rank() == 1:
        for path in Path(folder).glob("*-rank1/states"):
            path.write_bytes(b"")
    dist.barrier()
    batch = toy_batch(0, 0, dist.get_rank())
    with torch.set_grad_enabled(train), pytest.raises(OffloadError, match="states"):
        drive_engine(engine, [batch]) if train else engine(batch[0])
    engine.destroy()


@pytest.mark.parametrize("train", [True, False])
def test_what_cannot_be_read_is_an_error_on_every_rank(train):
    in_folder(2, loses_its_file, train)


def finds_no_space(folder):
    reserve = SwapFolder.reserve
    if dist.get_rank() == 1:

        def refuse(self, nbytes):
            raise OffloadError("disk full")

        SwapFolder.reserve = refuse
    try:
        with pytest.raises(OffloadError, match="disk full"):
            deepspeed.initialize(
                model=make_toy(), config=config_for(3, "bf16", 1, 0.5, offload_param=on_disk(folder))
            )
    finally:
        SwapFolder.reserve = reserve


def test_a_full_disk_is_an_error_on_every_rank():
    in_folder(2, finds_no_space)


def combinations_without_sense(folder):
    for stage, zero, message in (
        (2, {}, "offload_param.device"),
        (3, {"zero_hpz_partition_size": 2}, "zero_hpz_partition_size"),
    ):
        with pytest.raises(ConfigError, match=message):
            deepspeed.initialize(
                model=make_toy(),
                config=config_for(stage, "bf16", 1, 0.5, offload_param=on_disk(folder), **zero),
            )


def test_what_has_no_sense_beside_parameters_on_disk_is_refused():
    in_folder(2, combinations_without_sense)
