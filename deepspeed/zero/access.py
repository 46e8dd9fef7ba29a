"""Read and write single parameters' master weights, gradients and optimizer state, wherever they are.

Every function that returns or takes a *full* value is collective: all data-parallel ranks must call it, for
the same parameters in the same order; where one of them cannot read its disk, all raise OffloadError. The
*local* ones see this rank's piece, flattened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from deepspeed import comm
from deepspeed.errors import OffloadError, UsageError
from deepspeed.zero.slot import TrainedSlot, trained_slot
from deepspeed.zero.unit import Unit, VisitRange

Result = TypeVar("Result")


def safe_get_full_fp32_param(param: nn.Parameter) -> Tensor | None:
    """Return a parameter's master weight, whole (fp32 in the parameter's shape); None if it is not trained."""
    slot = trained_slot(param)
    if slot is None:
        return None
    slot.unit.adopt_edits()
    return _assemble(slot, _together(slot, lambda: _read(slot, slot.unit.visit_master)))


def safe_set_full_fp32_param(param: nn.Parameter, value: Tensor) -> None:
    """Set a parameter's master weight and the weight itself; `value` has the parameter's shape."""
    slot = _trained(param)
    _check_shape(param, value)
    with torch.no_grad(), changing(slot.unit):
        slot.unit.write(slot.index, value)
        _write_whole(slot, slot.unit.visit_master, value)


def safe_get_full_grad(param: nn.Parameter) -> Tensor | None:
    """Return the gradient that the next step will use, averaged and unscaled, before clipping (fp32, whole).

    None if the parameter is not trained, or nothing was reduced since the last step.
    """
    slot = trained_slot(param)
    if slot is None or slot.gradients.landed.is_empty:
        return None
    local = _together(slot, lambda: _read(slot, slot.gradients.landed.visit))
    return _assemble(slot, local) / slot.optimizer.gradient_divisor


def safe_set_full_grad(param: nn.Parameter, value: Tensor) -> None:
    """Set the gradient that the next step will use; `value` is unscaled and has the parameter's shape."""
    slot = _trained(param)
    _check_shape(param, value)
    if slot.gradients.landed.is_empty:
        raise UsageError("safe_set_full_grad: there is no gradient yet; call it between backward and step")
    summed = value * slot.optimizer.gradient_divisor
    _together(slot, lambda: _write_whole(slot, slot.gradients.landed.visit, summed))


def safe_get_full_optimizer_state(param: nn.Parameter, optim_state_key: str) -> Tensor | None:
    """Return one state tensor (``exp_avg``, ...) of a parameter, whole; None before the first step."""
    slot = trained_slot(param)
    if slot is None:
        return None
    local = _together(slot, lambda: _read(slot, _state(slot, optim_state_key)))
    return _assemble(slot, local) if _anywhere(slot, local is not None) else None


def safe_set_full_optimizer_state(param: nn.Parameter, value: Tensor, optim_state_key: str) -> None:
    """Set one state tensor of a parameter; `value` has the parameter's shape."""
    slot = _trained(param)
    _check_shape(param, value)
    written = _together(slot, lambda: _write_whole(slot, _state(slot, optim_state_key), value))
    if not _anywhere(slot, written):
        raise UsageError(
            f"safe_set_full_optimizer_state: there is no {optim_state_key} of {slot.name} yet; states are made "
            "by the first step"
        )


def safe_get_local_fp32_param(param: nn.Parameter) -> Tensor | None:
    """Return this rank's piece of the master weight (flat), None where it has none."""
    slot = trained_slot(param)
    return None if slot is None else _read(slot, slot.unit.visit_master)


def safe_set_local_fp32_param(param: nn.Parameter, value: Tensor) -> None:
    """Set this rank's piece of the master weight and of the stored weight; every rank sets its own."""
    slot = _trained(param)
    unit = slot.unit
    with torch.no_grad(), changing(unit):
        _write(slot, unit.visit_master, value.reshape(-1))
        piece = slot.my_piece()
        if piece is not None:
            unit.held.write_mine(piece.shard_start, value.reshape(-1))
        unit.publish()


def safe_get_local_grad(param: nn.Parameter) -> Tensor | None:
    """Return this rank's piece of the gradient (flat, averaged and unscaled), None where it has none."""
    slot = trained_slot(param)
    if slot is None or slot.gradients.landed.is_empty:
        return None
    local = _read(slot, slot.gradients.landed.visit)
    return None if local is None else local.float() / slot.optimizer.gradient_divisor


def safe_set_local_grad(param: nn.Parameter, value: Tensor) -> None:
    """Set this rank's piece of the gradient (flat, unscaled)."""
    slot = _trained(param)
    _write(slot, slot.gradients.landed.visit, value.reshape(-1) * slot.optimizer.gradient_divisor)


def safe_get_local_optimizer_state(param: nn.Parameter, optim_state_key: str) -> Tensor | None:
    """Return this rank's piece of a state tensor (flat), None where it has none."""
    slot = trained_slot(param)
    return None if slot is None else _read(slot, _state(slot, optim_state_key))


def safe_set_local_optimizer_state(param: nn.Parameter, value: Tensor, optim_state_key: str) -> None:
    """Set this rank's piece of a state tensor (flat)."""
    slot = _trained(param)
    _write(slot, _state(slot, optim_state_key), value.reshape(-1))


@contextmanager
def changing(unit: Unit) -> Iterator[None]:
    """Change what a unit holds; what was gathered of it is out of date afterwards."""
    if unit.users == 0:
        unit.release()
    with unit.changing():
        yield


def _trained(param: nn.Parameter) -> TrainedSlot:
    slot = trained_slot(param)
    if slot is None:
        raise UsageError("parameter: expected one that an engine trains, got one that is frozen or foreign")
    return slot


def _check_shape(param: nn.Parameter, value: Tensor) -> None:
    if value.shape != param.shape:
        raise UsageError(f"value: expected shape {tuple(param.shape)}, got {tuple(value.shape)}")


def _state(slot: TrainedSlot, key: str) -> VisitRange:
    return partial(slot.optimizer.states.visit_state, slot.unit, key)


def _together(slot: TrainedSlot, action: Callable[[], Result]) -> Result:
    """Read or set this rank's part; an OffloadError of one rank is raised on all."""
    result: Any = None
    error = None
    try:
        result = action()
    except OffloadError as caught:
        error = caught
    slot.optimizer.raise_together(error)
    done: Result = result
    return done


def _read(slot: TrainedSlot, visit: VisitRange) -> Tensor | None:
    """Return a copy of the parameter's piece of a shard (flat), None where this rank has none."""
    piece = slot.my_piece()
    if piece is None:
        return None
    parts = [part.clone() for _, part in visit(piece.shard_start, piece.shard_stop)]
    return torch.cat(parts) if parts else None


def _write(slot: TrainedSlot, visit: VisitRange, value: Tensor) -> bool:
    """Set the parameter's piece of a shard to `value` (flat, of the piece's size); return whether it is there."""
    piece, found = slot.my_piece(), False
    if piece is not None:
        for start, part in visit(piece.shard_start, piece.shard_stop, changed=True):
            offset = start - piece.shard_start
            part.copy_(value[offset : offset + part.numel()])
            found = True
    return found


def _write_whole(slot: TrainedSlot, visit: VisitRange, value: Tensor) -> bool:
    """Set the parameter's piece of a shard from the whole value."""
    piece = slot.my_piece()
    return piece is not None and _write(slot, visit, value.reshape(-1)[piece.param_start : piece.param_stop])


def _assemble(slot: TrainedSlot, local: Tensor | None) -> Tensor:
    """Put the pieces of all ranks together: each writes its own into zeros, and the sum is the whole."""
    unit, piece = slot.unit, slot.my_piece()
    shape = unit.params[slot.index].shape
    whole = torch.zeros(shape.numel(), dtype=torch.float32, device=unit.flat.device)
    if local is not None and piece is not None:
        whole[piece.param_start : piece.param_stop] = local
    group = unit.sharding.shard_group
    if group.size > 1:
        comm.all_reduce(whole, group=group.process_group, label=unit.names[slot.index])
    return whole.view(shape)


def _anywhere(slot: TrainedSlot, present: bool) -> bool:
    group = slot.unit.sharding.shard_group
    if group.size == 1:
        return present
    flag = torch.tensor(float(present), device=slot.unit.flat.device)
    comm.all_reduce(flag, group=group.process_group, label=slot.unit.names[slot.index])
    return bool(flag > 0)
