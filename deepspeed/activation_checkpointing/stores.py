"""Where the inputs of checkpoints stay between forward and backward.

    input ──> Partition ──> Host or Contiguous ──> kept until backward needs it, then the same way back
              my 1/n of it   elsewhere

Note [Which inputs]
Autograd saves a checkpoint's inputs through the hooks on saved tensors that are on top. Ours first ask the
hooks below, which may know better: sharded parameters are found by the gatherer, and inside an outer
checkpoint nothing has to be kept. Of what those leave alone, floating-point tensors are stored, except
parameters, which stay in memory anyway.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

from deepspeed.accelerator import get_accelerator
from deepspeed.comm import all_gather_single, all_reduce
from deepspeed.errors import ConfigError, UsageError

Undo = Callable[[Tensor], Tensor]
DIFFERENT = 1e-2
"""Difference, relative to the norm, from which two ranks' inputs are not the same up to rounding."""


class Store(Protocol):
    """A way to keep a saved input."""

    def put(self, tensor: Tensor, position: int) -> tuple[Tensor, Undo]:
        """Return what to keep of the checkpoint's input number `position`, and what makes it whole again."""


@dataclass(frozen=True)
class Kept:
    """A saved input that went through stores."""

    tensor: Tensor
    undos: Sequence[Undo]

    def restore(self) -> Tensor:
        """Return the input as it was."""
        tensor = self.tensor
        for undo in reversed(self.undos):
            tensor = undo(tensor)
        return tensor


def storing(stores: Sequence[Store], inputs: Iterable[Any]) -> saved_tensors_hooks:
    """Return a context for one checkpoint in which autograd keeps `inputs` by `stores`; see note [Which inputs]."""
    below = torch._C._autograd._top_saved_tensors_default_hooks(False)
    pack_below, unpack_below = below or (_same, _same)
    parameters = {one.untyped_storage().data_ptr() for one in inputs if isinstance(one, nn.Parameter)}
    positions = count()

    def pack(tensor: Tensor) -> Any:
        packed = pack_below(tensor)
        if not _is_activation(packed) or packed.untyped_storage().data_ptr() in parameters:
            return packed
        position, undos = next(positions), []
        for store in stores:
            packed, undo = store.put(packed, position)
            undos.append(undo)
        return Kept(packed, undos)

    def unpack(packed: Any) -> Tensor:
        return unpack_below(packed.restore() if isinstance(packed, Kept) else packed)  # type: ignore[no-any-return]

    return saved_tensors_hooks(pack, unpack)


class Partition:
    """Each rank of a model-parallel group keeps an equal chunk of what is the same on all of them.

    That it is the same is checked at the first input of each shape.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self._checked: set[Any] = set()

    def put(self, tensor: Tensor, position: int) -> tuple[Tensor, Undo]:
        """Keep this rank's chunk; the chunks are gathered again, one collective for each input."""
        shape, strides = tensor.shape, _dense_strides(tensor)
        dense = tensor if tensor.stride() == strides else tensor.clone()
        in_memory = dense.as_strided((dense.numel(),), (1,))
        chunk = math.ceil(dense.numel() / self.size)
        mine = in_memory[self.rank * chunk : (self.rank + 1) * chunk]
        part = dense.new_zeros(chunk)
        part[: mine.numel()].copy_(mine)

        def gather(part: Tensor) -> Tensor:
            whole = part.new_empty(chunk * self.size)
            all_gather_single(whole, part, group=self.group)
            return whole.as_strided(shape, strides)

        self._check(tensor, position, lambda: gather(part))
        return part, gather

    def _check(self, tensor: Tensor, position: int, gathered: Callable[[], Tensor]) -> None:
        kind = (tensor.shape, tensor.dtype)
        if kind in self._checked:
            return
        self._checked.add(kind)
        difference = torch.linalg.vector_norm(gathered() - tensor)
        differs = (difference > DIFFERENT * torch.linalg.vector_norm(tensor)).int()
        all_reduce(differs, op=dist.ReduceOp.MAX, group=self.group)
        if differs:
            raise UsageError(
                f"activation_checkpointing.partition_activations: expected the floating-point inputs of a "
                f"checkpoint to be the same on all {self.size} model-parallel ranks, got others in input "
                f"{position} of shape {tuple(tensor.shape)}; turn the key off, or do not pass it as an argument"
            )


class Host:
    """Inputs go to host memory, as torch's `save_on_cpu` does it."""

    def __init__(self) -> None:
        accelerator = get_accelerator()
        self._hooks = save_on_cpu(pin_memory=not accelerator.on_host, device_type=accelerator.kind)

    def put(self, tensor: Tensor, position: int) -> tuple[Tensor, Undo]:
        """Keep a copy in host memory (the tensor itself if it is there already)."""
        device, kept = self._hooks.pack_hook(tensor)
        return kept, lambda kept: self._hooks.unpack_hook((device, kept))


class Contiguous:
    """Inputs are copied into one buffer for each position and size, made at its first use.

    A place in it is free again when autograd gives up the input. Buffers nobody uses make room for other sizes.

    Args:
        number: places in a buffer: checkpoints that wait for backward at once.
        on_host: whether the buffers are in host memory.
    """

    def __init__(self, number: int, *, on_host: bool = False) -> None:
        self.number = number
        self.on_host = on_host
        self._buffers: dict[Any, _Buffer] = {}

    def put(self, tensor: Tensor, position: int) -> tuple[Tensor, Undo]:
        """Keep a copy in the buffer; it comes back as another copy, since its place may be filled anew."""
        kind = (position, tensor.numel(), tensor.dtype, tensor.device)
        if kind not in self._buffers:
            self._buffers = {key: buffer for key, buffer in self._buffers.items() if buffer.is_used}
            self._buffers[kind] = _Buffer(tensor, self.number, self.on_host)
        place = _Place(self._buffers[kind], tensor.device)
        kept = place.memory.as_strided(tensor.shape, _dense_strides(tensor))
        return kept.copy_(tensor, non_blocking=True), place

    def clear(self) -> None:
        """Forget the buffers; each is freed with the last input in it."""
        self._buffers.clear()


class _Buffer:
    def __init__(self, tensor: Tensor, number: int, on_host: bool) -> None:
        device = torch.device("cpu") if on_host else tensor.device
        pinned = on_host and tensor.device.type != "cpu"
        self.memory = torch.empty(
            number, tensor.numel(), dtype=tensor.dtype, device=device, pin_memory=pinned
        )
        self.free = list(reversed(range(number)))

    @property
    def is_used(self) -> bool:
        return len(self.free) < len(self.memory)

    def take(self) -> int:
        if not self.free:
            raise ConfigError(
                "activation_checkpointing.number_checkpoints: expected at least as many as checkpoints wait for "
                f"backward at once, got {len(self.memory)} and one more checkpoint; raise it"
            )
        return self.free.pop()


class _Place:
    """A row of a buffer, taken until this object dies; calling it brings the row back to the device."""

    def __init__(self, buffer: _Buffer, device: torch.device) -> None:
        self._index = buffer.take()
        self._buffer, self._device = buffer, device
        self.memory = buffer.memory[self._index]

    def __call__(self, kept: Tensor) -> Tensor:
        return kept.to(self._device, copy=True, non_blocking=True)

    def __del__(self) -> None:
        if hasattr(self, "_buffer"):  # a full buffer gave it no row
            self._buffer.free.append(self._index)


def _is_activation(packed: Any) -> bool:
    return type(packed) is Tensor and packed.is_floating_point() and packed.layout is torch.strided


def _dense_strides(tensor: Tensor) -> tuple[int, ...]:
    """Return the strides of a copy of `tensor`: its own, unless it has holes or overlaps."""
    return torch.empty_like(tensor, device="meta").stride()


def _same(packed: Any) -> Any:
    return packed
