"""The group of ranks that train on different data with the same weights."""

from __future__ import annotations

from typing import Any, cast

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from deepspeed.errors import ConfigError, NotBuiltError

DATA_AXES = ("data_parallel", "dp")


def data_parallel_group(mpu: Any = None, mesh: Any = None) -> dist.ProcessGroup | None:
    """Return the data-parallel process group; None means every rank.

    `mpu` is a model-parallel unit with ``get_data_parallel_group()`` and decides if given. `mesh` is a torch
    DeviceMesh with an axis ``data_parallel`` or ``dp``, or the sizes (data parallel, sequence parallel),
    whose product must be the number of ranks.
    """
    if mpu is not None:
        return cast("dist.ProcessGroup | None", mpu.get_data_parallel_group())
    if mesh is None:
        return None
    if isinstance(mesh, DeviceMesh):
        return _axis_group(mesh)
    _check_sizes(tuple(mesh))
    return None


def _axis_group(mesh: DeviceMesh) -> dist.ProcessGroup:
    names = mesh.mesh_dim_names or ()
    for name in DATA_AXES:
        if name in names:
            return mesh.get_group(name)
    if mesh.ndim == 1:
        return mesh.get_group(0)
    raise ConfigError(f"mesh_param: expected a mesh with an axis data_parallel or dp, got the axes {names}")


def _check_sizes(sizes: tuple[int, ...]) -> None:
    world = dist.get_world_size() if dist.is_initialized() else 1
    if len(sizes) != 2 or sizes[0] * sizes[1] != world:
        raise ConfigError(
            f"mesh_param: expected (data parallel size, sequence parallel size) with product {world}, the "
            f"number of ranks, got {sizes}"
        )
    if sizes[1] > 1:
        raise NotBuiltError(
            f"mesh_param: expected a sequence parallel size of 1, got {sizes[1]}; sequence parallelism is "
            "not built yet"
        )
