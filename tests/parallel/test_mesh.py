"""The data-parallel group is the one that was asked for."""

import pytest
import torch
import torch.distributed as dist
from harness import on_ranks
from torch.distributed.device_mesh import init_device_mesh

from deepspeed.errors import ConfigError, NotBuiltError
from deepspeed.parallel import data_parallel_group
from deepspeed.utils import groups


class Unit:
    def get_data_parallel_group(self):
        return "mine"


def test_a_model_parallel_unit_decides():
    assert data_parallel_group(mpu=Unit(), mesh=(1, 1)) == "mine"


def test_without_one_every_rank_is_data_parallel():
    assert data_parallel_group() is None
    assert data_parallel_group(mesh=(1, 1)) is None


@on_ranks(2)
def test_a_mesh_gives_its_data_axis():
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "tp"))
    assert dist.get_process_group_ranks(data_parallel_group(mesh=mesh)) == [0, 1]
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data_parallel", "tp"))
    assert dist.get_world_size(data_parallel_group(mesh=mesh)) == 1
    assert dist.get_world_size(data_parallel_group(mesh=init_device_mesh("cpu", (2,)))) == 2
    with pytest.raises(ConfigError, match="axis data_parallel or dp"):
        data_parallel_group(mesh=init_device_mesh("cpu", (1, 2), mesh_dim_names=("a", "b")))


@on_ranks(2)
def test_sizes_must_make_up_all_ranks():
    assert data_parallel_group(mesh=(2, 1)) is None
    with pytest.raises(NotBuiltError, match="sequence parallelism is not built yet"):
        data_parallel_group(mesh=(1, 2))
    with pytest.raises(ConfigError, match=r"with product 2, the number of ranks, got \(3, 1\)"):
        data_parallel_group(mesh=(3, 1))


@on_ranks(2)
def test_documented_group_names_know_one_axis():
    assert groups._get_data_parallel_world_size() == 2
    assert groups._get_data_parallel_rank() == dist.get_rank()
    total = torch.ones(1)
    dist.all_reduce(total, group=groups._get_data_parallel_group())
    assert total.item() == 2
    for axis in ("sequence", "model", "tensor_model"):
        assert getattr(groups, f"_get_{axis}_parallel_group")() is None
        assert getattr(groups, f"_get_{axis}_parallel_world_size")() == 1
        assert getattr(groups, f"_get_{axis}_parallel_rank")() == 0


def test_groups_answer_before_anything_runs():
    assert groups._get_data_parallel_group() is None
    assert groups._get_data_parallel_world_size() == 1
    assert groups._get_data_parallel_rank() == 0
