"""Which ranks work together: the data-parallel group and the arithmetic of process grids."""

from deepspeed.parallel.mesh import data_parallel_group
from deepspeed.parallel.topology import (
    PipeDataParallelTopology,
    PipeModelDataParallelTopology,
    ProcessTopology,
)

__all__ = [
    "PipeDataParallelTopology",
    "PipeModelDataParallelTopology",
    "ProcessTopology",
    "data_parallel_group",
]
