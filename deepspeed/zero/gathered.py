"""GatheredParameters: read and change parameters that are released between uses.

Note [What moves]
Loops that visit one parameter after another are common (weights for an inference engine, EMA). So a unit is
gathered only where at least half of it is asked for; otherwise just the pieces of the parameters asked for
travel, into memory of their own that the parameter shows for as long as the context lasts. Where the unit was
gathered, its other parameters are whole too, and treated as if they had been asked for: a change of theirs is
kept like any other.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deepspeed import comm
from deepspeed.errors import UsageError
from deepspeed.zero.slot import Slot, is_zero_param, slot_of
from deepspeed.zero.stage import RankGroup
from deepspeed.zero.unit import Unit

BLOCK = 2**16
"""Words of a parameter that are weighed at once to notice changes."""
ODD = 0x5851F42D4C957F2D
"""What the sum of the blocks so far is multiplied by before the next is added."""


class GatheredParameters:
    """Context in which parameters are whole; changes made in it are kept.

    With `modifier_rank`, that rank's values are everybody's afterwards. Without it, every rank must make the
    same changes.

    Args:
        params: a parameter or any iterable; what is not sharded, None included, is left alone.
        modifier_rank: global rank whose changes count; None: all ranks make the same.
        fwd_module: accepted for old scripts; parameters used in another module's forward are found anyway.
        enabled: False does nothing.

    Raises:
        UsageError: at the end, if only some ranks changed a parameter and there is no `modifier_rank`.
    """

    def __init__(
        self,
        params: Any,
        modifier_rank: int | None = None,
        fwd_module: nn.Module | None = None,
        enabled: bool = True,
    ) -> None:
        given: Iterable[Any] = [params] if params is None or isinstance(params, Tensor) else params
        sharded = {id(one): one for one in given if is_zero_param(one)} if enabled else {}
        self._params: list[Any] = sorted(sharded.values(), key=lambda one: one.ds_id)
        self._modifier = modifier_rank
        self._whole_units: list[Unit] = []
        self._alone: list[Slot] = []

    def __enter__(self) -> GatheredParameters:
        for unit, wanted in self._by_unit().items():
            if unit.is_whole or 2 * sum(one.ds_numel for one in wanted) >= sum(unit.layout.numels):
                if unit.users == 0:
                    asked = {id(one) for one in wanted}
                    self._params += [one for one in unit.params if id(one) not in asked]
                unit.users += 1
                unit.gather()
                self._whole_units.append(unit)
            else:
                alone = [one.ds_slot for one in wanted if not unit.is_shown(one.ds_slot.index)]
                for slot in alone:
                    unit.show(slot.index)
                self._alone += alone
        self._before = {id(one): _fingerprint(one) for one in self._params} if self._must_compare else {}
        return self

    def __exit__(self, kind: Any, *error: Any) -> None:
        kept = False
        try:
            self._dismiss_resized()
            if kind is None and self._params:
                self._keep_changes()
            kept = kind is None
        finally:
            for param in self._params:
                if kept or not param.ds_persist:  # if not kept, each rank may have made others
                    param.ds_slot.unit.forget_edits(param.ds_slot.index)
            for slot in self._alone:
                slot.unit.hide(slot.index)
            for unit in self._whole_units:
                unit.users -= 1
                if unit.users == 0:
                    unit.release()
            self._whole_units, self._alone = [], []

    def _dismiss_resized(self) -> None:
        """Let go of parameters that got another size (``resize_token_embeddings``), where no engine has them."""
        resized = [one for one in self._params if one.shape != one.ds_shape and one.ds_slot.unit.may_resize]
        for unit in [one.ds_slot.unit for one in resized]:
            unit.dismiss()
            self._whole_units.remove(unit)
        if resized:
            self._params = [one for one in self._params if slot_of(one) is not None]

    def _by_unit(self) -> dict[Unit, list[Any]]:
        units: dict[Unit, list[Any]] = {}
        for param in self._params:
            units.setdefault(param.ds_slot.unit, []).append(param)
        return units

    @property
    def _must_compare(self) -> bool:
        """Whether changes are to be found out: nobody decides, and there is somebody to disagree with."""
        alone = not self._params or self._params[0].ds_slot.unit.sharding.everyone.size == 1
        return self._modifier is None and not alone

    @torch.no_grad()
    def _keep_changes(self) -> None:
        for param in self._params:
            _check_size(param)
        everyone = self._params[0].ds_slot.unit.sharding.everyone
        changed = self._params
        if everyone.size > 1:
            if self._modifier is None:
                changed = self._changed_anywhere(everyone)
            for param in changed:
                self._agree(param, everyone)
        kept = {id(param) for param in changed}
        for unit, params in self._by_unit().items():
            mine = [param for param in params if id(param) in kept]
            if mine:
                with unit.changing():
                    for param in mine:
                        unit.write(param.ds_slot.index, param)

    def _changed_anywhere(self, everyone: RankGroup) -> list[Any]:
        """Find the parameters that some rank has changed."""
        changed = [(self._before[id(one)] != _fingerprint(one)).any() for one in self._params]
        flags = torch.stack(changed).float()
        comm.all_reduce(flags, op=dist.ReduceOp.MAX, group=everyone.process_group, label="GatheredParameters")
        return [param for param, flag in zip(self._params, flags.tolist(), strict=True) if flag]

    def _agree(self, param: Any, everyone: RankGroup) -> None:
        """Take the modifier's values, or make sure that all ranks have the same."""
        source = everyone.first_rank if self._modifier is None else self._modifier
        value = param.detach() if self._modifier is not None else param.detach().clone()
        comm.broadcast(value, source, group=everyone.process_group, label=param.ds_slot.name)
        if self._modifier is not None:
            return
        apart = torch.tensor(float(not torch.equal(value, param.detach())), device=value.device)
        comm.all_reduce(apart, op=dist.ReduceOp.MAX, group=everyone.process_group, label=param.ds_slot.name)
        if apart:
            raise UsageError(
                f"GatheredParameters: {param.ds_slot.name} was changed in different ways on different ranks; "
                "name the rank whose values count, modifier_rank=0, or make the same change on every rank"
            )


def _check_size(param: Any) -> None:
    if param.shape != param.ds_shape:
        raise UsageError(
            f"{param.ds_slot.name}: expected shape {tuple(param.ds_shape)} as before, got {tuple(param.shape)}; its "
            "shard has no room for another: change it before deepspeed.initialize"
        )


def _fingerprint(param: Any) -> Tensor:
    """Return what changes when a parameter does: by its name, or through ``.data``.

    The words of its bits are summed with random odd weights, modulo 2**64: one changed word changes the sum, and
    several, or some that change places, leave it alone once in 2**50 times or less.
    """
    word = {1: torch.uint8, 2: torch.int16}.get(param.element_size(), torch.int32)
    bits = param.detach().contiguous().reshape(-1).view(word)
    weights = _weights(bits.device)
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for block in bits.split(BLOCK):
        total = total * ODD + (block * weights[: len(block)]).sum()
    return torch.stack([total, torch.full_like(total, param._version)])


@cache
def _weights(device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(-(2**62), 2**62, (BLOCK,), generator=generator)
    return (weights | 1).to(device)


def whole_values(state: dict[str, Any], *, keep: bool) -> dict[str, Any] | None:
    """Return a state dict with whole values, one parameter after the other; None where they are not kept.

    Args:
        state: names and tensors (``state_dict(keep_vars=True)``), the same names on every rank. Sharded
            parameters are copied to host memory, one that stands under two names once.
        keep: whether this rank wants them.

    Those that stay whole are copied too: they are views of a flat, and what saves a state dict takes tensors
    that share memory for tied ones and drops them.
    """
    copies: dict[int, Tensor] = {}
    whole = {}
    for name, value in state.items():
        if is_zero_param(value):
            if id(value) not in copies:
                copies[id(value)] = _copy_of(value, keep=keep)
            whole[name] = copies[id(value)]
        else:
            whole[name] = value.detach() if isinstance(value, Tensor) else value
    return whole if keep else None


def _copy_of(param: Any, *, keep: bool) -> Tensor:
    """Read a parameter into host memory; a rank that keeps nothing helps the others where they need it."""
    if param.ds_persist:
        return param.detach().to("cpu", copy=keep)  # type: ignore[no-any-return]
    slot: Slot = param.ds_slot
    unit = slot.unit
    if not keep and unit.held.reads_alone:
        return torch.empty(0)
    shape = unit.params[slot.index].shape
    value = torch.empty(shape, dtype=unit.flat.dtype, device=unit.flat.device)
    unit.read(slot.index, value)
    return value.cpu() if keep else torch.empty(0)
