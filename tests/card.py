"""A device that no machine has: tensors on it have no values, and what would make the host wait for it is seen.

It is a device of torch's in Python, named ``card``, under fake tensors and a process group that sends nothing.
Reading a value of a fake tensor is an error; copies that the host waits for and waiting for streams are counted.
The name is given to torch for the life of a process, so this is for processes of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import deepspeed.zero.optimizer
from deepspeed.accelerator import Accelerator, set_accelerator

waits: Counter[str] = Counter()
"""How often the host waited for the card, by the reason."""


class Stream:
    """A stream or an event, on which nothing happens."""

    def wait_stream(self, other: Stream) -> None:
        """Order work on the card; the host goes on."""

    def wait_event(self, other: Stream) -> None:
        """Order work on the card; the host goes on."""

    def record(self, stream: Any = None) -> None:
        """Mark a point."""

    def synchronize(self) -> None:
        waits["stream"] += 1


class CardModule:
    """What ``torch.cuda`` is to cuda."""

    Stream = Event = Stream

    def is_available(self) -> bool:
        return True

    is_initialized = is_bf16_supported = is_available

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def set_device(self, _index: int) -> None:
        """There is one."""

    def manual_seed_all(self, _seed: int) -> None:
        """Nothing is drawn."""

    def current_stream(self, _index: int | None = None) -> Stream:
        return Stream()

    def stream(self, _stream: Stream) -> Any:
        return nullcontext()

    def synchronize(self, _index: int | None = None) -> None:
        waits["device"] += 1


class Card(Accelerator):
    """The card as the process's accelerator."""

    def __init__(self) -> None:
        self.kind = self._name = "card"
        self.module = torch.get_device_module("card")
        self._communication_backend_name = "fake"

    def pin_memory(self, tensor: Tensor, align_bytes: int = 1) -> Tensor:
        return tensor  # fake tensors cannot be


class Copies(TorchDispatchMode):
    """Count copies between host and card that the host waits for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func._overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            source = args[1] if func._overloadpacket is torch.ops.aten.copy_ else args[0]
            blocking = not (kwargs.get("non_blocking") or args[2:3] == (True,))
            if blocking and source.device.type != result.device.type:
                waits[f"copy from {source.device.type}"] += 1
        return result


def read_flag(_flag: Tensor) -> bool:
    """Stand in for reading a flag of the step."""
    waits["flag"] += 1
    return False


@contextmanager
def card(ranks: int) -> Iterator[None]:
    """Have the card, as the first of `ranks` ranks."""
    if not hasattr(torch, "card"):
        _setup_privateuseone_for_python_backend("card", backend_module=CardModule())
        set_accelerator(Card())
    before, deepspeed.zero.optimizer._read = deepspeed.zero.optimizer._read, read_flag
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        with FakeTensorMode(), Copies():
            yield
    finally:
        dist.destroy_process_group()
        deepspeed.zero.optimizer._read = before
