"""One rank of a large job on a small machine: a device without memory, and a group without peers.

Tensors are fake: they have shapes, dtypes, a device and storages of a size, and no values. The device is one that
torch does not know, so that the engine takes the ways it takes on a GPU and not those for ranks of a host; where it
asked for a value of a tensor on it, the simulation would end with an error. The group says of every collective that
it is done.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils import backend_registration

from deepspeed.accelerator import Accelerator, set_accelerator

DEVICE = "simulated"


class Simulated(Accelerator):
    """The device as the process's accelerator."""

    def pin_memory(self, tensor: Tensor, align_bytes: int = 1) -> Tensor:
        """Return the tensor: fake memory cannot be locked."""
        return tensor


@contextmanager
def simulated(ranks: int) -> Iterator[torch.device]:
    """Be the first of `ranks` inside; gives the device to put inputs on. The process keeps the device."""
    if not hasattr(torch, DEVICE):
        backend_registration._setup_privateuseone_for_python_backend(DEVICE)
        dist.Backend.default_device_backend_map[DEVICE] = "fake"
        set_accelerator(Simulated(DEVICE))
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        with FakeTensorMode():
            yield torch.device(DEVICE, 0)
    finally:
        dist.destroy_process_group()
