"""Parameters around each unit's forward and backward.

Note [On demand]
A unit is gathered when something needs it, whatever that is, and a guess about the order only brings it in
earlier. Three things can need it:

    forward     a module that owns parameters of the unit, or the block they belong to, is entered
    demand      an operation meets a released parameter inside somebody else's forward or backward (released.py)
    backward    autograd unpacks a view of the unit that it saved (note [Saved views])

It is released when the last module that needs it is left, or in backward when the gradients of all its
parameters have arrived (frozen or unused ones give none: then when backward has gone two units further), unless it
is soon used again. So graphs may change from step to step, call modules in any order, more than once or not at all.

Note [Saved views]
What autograd saves of a whole parameter is a view into the flat. A hook on saved tensors replaces it by the
view and its unit, and gathers the unit before the view is handed out. Other hooks (activation checkpointing)
keep working: what is not such a view goes to the hook below. Reading freed memory is impossible then, however
the graph came about.

Note [A node may still hold it]
A backward function that has unpacked views may run other code before it uses them. A unit is therefore not
released while the function that unpacked it last is running, nor by a backward inside that backward.

Note [Views in outputs]
A module may return a view of its weight (``return self.table[:length]``). Its unit then stays for as long as
the forward that called the module lasts; what the outermost forward returns is a copy.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

from deepspeed.common.logging import warn_once
from deepspeed.common.nested import tensors_in
from deepspeed.common.untraced import may_be_traced
from deepspeed.errors import OffloadError, UsageError
from deepspeed.zero import external, released
from deepspeed.zero.anchors import anchors_of, outermost, put_hooks, remove_hooks, running_anchor
from deepspeed.zero.meter import GatherMeter
from deepspeed.zero.order import UseOrder
from deepspeed.zero.slot import Slot, is_zero_param, slot_of
from deepspeed.zero.unit import Unit, refuse
from deepspeed.zero.unpacked import as_asked_for

STALE = 2
"""Units that backward went through last and that stay gathered, although gradients are missing."""


@dataclass(frozen=True)
class GatherLimits:
    """How much may be gathered, in elements.

    Attributes:
        live: most elements gathered at once (one unit in use may exceed it).
        reuse: a unit that is expected again within so many elements is kept.
        prefetch: most elements gathered ahead of their use.
    """

    live: int = 1_000_000_000
    reuse: int = 1_000_000_000
    prefetch: int = 50_000_000


@dataclass(eq=False)
class Frame:
    """A forward that is running: what it uses, and the hook on saved tensors it brought along."""

    module: nn.Module
    units: list[Unit] = field(default_factory=list)
    hooks: Any = None


@dataclass(frozen=True, eq=False)
class SavedView:
    """A view of a unit's flat that autograd saved, and the parameter's slot where it is a parameter itself."""

    unit: Unit
    view: Tensor
    updates: int
    slot: Slot | None

    def __post_init__(self) -> None:
        self.unit.memory.guarded += 1

    def __del__(self) -> None:
        self.unit.memory.guarded -= 1


class Gatherer:
    """Gather units when they are used and release them afterwards.

    Args:
        module: the model.
        units: all its units that are released between uses.
        limits: how much may be gathered.
        meter: the units' meter.

    Attributes:
        raised_by_step: whether there is a step that raises what goes wrong in a training pass.
    """

    def __init__(
        self, module: nn.Module, units: Iterable[Unit], limits: GatherLimits, meter: GatherMeter
    ) -> None:
        self.module = module
        self.units = [unit for unit in units if unit.sharding.releases]
        self.limits = limits
        self.meter = meter
        self._failure: OffloadError | None = None
        self.raised_by_step = False
        self._reads_ahead = any(unit.held.reads_ahead for unit in self.units)
        self._by_storage = {unit.memory.key: unit for unit in self.units}
        self._orders = {True: UseOrder(), False: UseOrder()}  # of passes with gradients, and without
        self._training = False
        self._frames: list[Frame] = []
        self._unpacked: dict[Unit, tuple[Any, int]] = {}  # unit -> the node that unpacked it last, its task
        self._in_backward: list[Unit] = []  # in the order of their last use in the running backward
        self._read: dict[int, list[Unit]] = {}  # a backward's task -> units that were read by name in it
        self._ending: set[int] = set()  # graph tasks whose end is being waited for
        self._in_graphs = False  # see note [Blocks in graphs] in anchors.py
        self.forward_hooks: list[RemovableHandle] = []
        self.backward_hooks: list[RemovableHandle] = []
        for unit in self.units:
            unit.demand = self._demand
        self.attach(module)

    # -- hooks ------------------------------------------------------------------------------------

    def attach(self, module: nn.Module | None = None) -> None:
        """Put hooks on the modules that need units; no `module`: on those of the whole model."""
        root = self.module if module is None else module
        self._anchors = anchors_of(root, self.units)
        self.forward_hooks += put_hooks(root, self._anchors, weakref.ref(self), in_graphs=self._in_graphs)

    def let_compile(self) -> list[nn.Module]:
        """Make ready for torch.compile (note [Blocks in graphs] in anchors.py), and return what may be compiled."""
        if not self._in_graphs:
            self._in_graphs = True
            released.leave_graphs()
            remove_hooks(self.forward_hooks)
            self.attach()
        return outermost(self.module, self._anchors)

    _register_deepspeed_module = attach  # what TRL calls after generate()
    setup_zero_stage3_hooks = attach  # what open-instruct does

    def detach(self) -> None:
        """Remove the hooks, and release what is gathered."""
        remove_hooks(self.forward_hooks)
        self.release_all()
        for unit in self.units:
            unit.demand = refuse

    # -- forward ----------------------------------------------------------------------------------

    def enter(self, module: nn.Module, units: Iterable[Unit]) -> None:
        """A module that needs `units` begins its forward."""
        if not self._frames and not _running_task():
            self._training = torch.is_grad_enabled()
            self._order.begin_pass()
        frame = Frame(module)
        self._frames.append(frame)
        for unit in units:
            self._use(unit, frame)
        for _, param in external.of(module)():
            slot = slot_of(param)
            if slot is not None:
                self._use(slot.unit, frame)
        if torch.is_grad_enabled():
            frame.hooks = self._watch_saving()

    def leave(self, module: nn.Module, output: Any = None) -> Any:
        """A module has ended its forward, by an exception perhaps; return what replaces its output, or None."""
        views = (self._unit_of_view(tensor) for tensor in tensors_in(output))  # see note [Views in outputs]
        lent = {unit for unit in views if unit is not None}
        while any(frame.module is module for frame in self._frames):
            frame = self._frames.pop()
            if frame.hooks is not None:
                frame.hooks.__exit__(None, None, None)
            for unit in frame.units:
                if unit in lent and _running_task():
                    self._read.setdefault(_running_task(), []).append(unit)
                elif unit in lent and self._frames:
                    self._frames[-1].units.append(unit)
                else:
                    unit.users -= 1
                    self._left(unit)
            if frame.module is module:
                break
        if self._frames or _running_task():
            return None
        if lent:
            output = tree_map_only(Tensor, self._copy_of_view, output)
        if not self._training:
            self.release_all()
        return output if lent else None

    def _unit_of_view(self, tensor: Tensor) -> Unit | None:
        if isinstance(tensor, nn.Parameter) or tensor.layout != torch.strided:
            return None
        return self._by_storage.get(tensor.untyped_storage()._cdata)

    def _copy_of_view(self, tensor: Tensor) -> Tensor:
        return tensor if self._unit_of_view(tensor) is None else tensor.clone()

    def _use(self, unit: Unit, frame: Frame) -> None:
        unit.users += 1
        frame.units.append(unit)
        self._bring(unit)
        unit.gather()
        if _running_task():
            self._note_backward(unit)

    def _left(self, unit: Unit) -> None:
        if unit.users > 0:
            return
        if _running_task() or self._is_soon_used(unit):
            unit.rest()
        else:
            unit.release()

    def _demand(self, unit: Unit) -> AbstractContextManager[object] | None:
        """Gather a unit for an operation inside a forward; it stays until that forward ends."""
        task = _running_task()
        if task:  # what autograd saves of it may go past our hooks, to those of a recomputation
            self._bring(unit)
            unit.gather()
            unit.users += 1
            self._note_backward(unit)
            self._read.setdefault(task, []).append(unit)
        elif self._frames:
            self._use(unit, self._frames[-1])
        else:
            part = running_anchor(self._anchors)
            return None if part is None else self._forward_of(part, unit)
        return nullcontext()

    @contextmanager
    def _forward_of(self, part: nn.Module, unit: Unit) -> Iterator[None]:
        """Make an operation a forward of its own: that of its module has no hooks (note [Blocks in graphs])."""
        self.enter(part, (unit,))
        unit.lend = lambda _, result: tree_map_only(Tensor, self._copy_of_view, result)
        try:
            yield
        finally:
            unit.lend = None
            self.leave(part)

    # -- backward ---------------------------------------------------------------------------------

    def _watch_saving(self) -> saved_tensors_hooks | None:
        """See to what autograd saves from now on; None where that is seen to already."""
        if _top_hooks_are_of(self):
            return None
        hooks = self._save_hooks()
        hooks.__enter__()
        return hooks

    def _save_hooks(self) -> saved_tensors_hooks:
        below = _top_hooks()
        pack_below, unpack_below = below or (None, None)

        def pack(tensor: Tensor) -> Any:
            unit = self._by_storage.get(tensor.untyped_storage()._cdata)
            if unit is not None:
                if unit.shown != unit.updates:
                    raise _outdated(unit)
                return SavedView(unit, tensor.detach(), unit.updates, slot_of(tensor))
            return tensor if pack_below is None else pack_below(tensor)

        def unpack(packed: Any) -> Tensor:
            if isinstance(packed, SavedView):
                return as_asked_for(self._unpack(packed), packed.slot)
            if unpack_below is not None:
                return unpack_below(packed)  # type: ignore[no-any-return]
            return as_asked_for(packed, packed.ds_slot) if is_zero_param(packed) else packed

        if may_be_traced():
            pack, unpack = torch.compiler.disable(pack), torch.compiler.disable(unpack)
        pack.gatherer = self  # type: ignore[attr-defined]
        return saved_tensors_hooks(pack, unpack)

    def _unpack(self, saved: SavedView) -> Tensor:
        unit = saved.unit
        if unit.updates != saved.updates:
            raise UsageError(
                f"{unit.names[0]}: its values changed between forward and backward; call backward before step, "
                "or run forward again"
            )
        self._unpacked[unit] = (torch._C._current_autograd_node(), _running_task())
        self._bring(unit)
        self._note_backward(unit)
        if torch.is_grad_enabled() and _running_task():
            self._watch_saving()  # of the node that unpacks, in a backward that is differentiated itself; it ends there
        return saved.view

    def _note_backward(self, unit: Unit) -> None:
        task = _running_task()
        if task not in self._ending:
            self._ending.add(task)
            Variable._execution_engine.queue_callback(lambda: self._backward_ended(task))
        if self._in_backward[-1:] == [unit]:
            return
        if unit in self._in_backward:
            self._in_backward.remove(unit)
        self._in_backward.append(unit)
        for stale in self._in_backward[:-STALE]:
            self._release_in_backward(stale)

    def gradients_arrived(self, unit: Unit) -> None:
        """Release a unit whose parameters all have their gradients: nothing in this backward needs it."""
        if unit.memory.key in self._by_storage:
            self._release_in_backward(unit)

    def _release_in_backward(self, unit: Unit) -> None:
        if unit.users == 0 and not self._is_held_by_node(unit):
            self._forget(unit)
            unit.release()

    def _is_held_by_node(self, unit: Unit) -> bool:
        """See note [A node may still hold it]."""
        node, task = self._unpacked.get(unit, (None, _running_task()))
        if task != _running_task():
            return True
        return node is not None and node is torch._C._current_autograd_node()

    def _backward_ended(self, task: int) -> None:
        self._ending.discard(task)
        self._end_reading(task)
        for unit in list(self._in_backward):
            if self._unpacked.get(unit, (None, task))[1] == task and unit.users == 0:
                self._forget(unit)
                unit.release()

    def _end_reading(self, task: int) -> None:
        for unit in self._read.pop(task, ()):
            unit.users -= 1

    def _forget(self, unit: Unit) -> None:
        self._unpacked.pop(unit, None)
        if unit in self._in_backward:
            self._in_backward.remove(unit)

    # -- what is gathered -------------------------------------------------------------------------

    def _bring(self, unit: Unit) -> None:
        """Make a unit whole, and begin to gather those expected after it."""
        is_new = self._order.used(unit, _running_task() > 0)
        if not unit.is_whole:
            if not unit.is_gathering:
                self._make_room(unit)
            try:
                unit.bring()
            except OffloadError as error:
                if not (self.raised_by_step and self._training):
                    raise
                self._failure = self._failure or error.with_traceback(None)  # its frames would keep the graph
                _show_zeros(unit)
        if is_new and self._reads_ahead:
            self._prefetch()

    def take_failure(self) -> OffloadError | None:
        """Return what went wrong in a training pass; the caller raises it."""
        failure, self._failure = self._failure, None
        return failure

    def _prefetch(self) -> None:
        ahead = 0
        for unit in self._order.upcoming():
            if unit.is_whole or unit.is_gathering or not unit.held.reads_ahead:
                continue
            ahead += unit.layout.total
            if ahead > self.limits.prefetch or self.meter.numel + unit.layout.total > self.limits.live:
                return
            unit.start_gather()

    def _make_room(self, wanted: Unit) -> None:
        """Release units that wait for a later use, those that wait longest first."""
        if self.meter.numel + wanted.layout.total <= self.limits.live:
            return
        idle = [unit for unit in self.units if unit.users == 0 and (unit.is_whole or unit.is_gathering)]
        for unit in sorted(idle, key=self._order.distance, reverse=True):
            if not self._is_held_by_node(unit):
                self._forget(unit)
                unit.release()
            if self.meter.numel + wanted.layout.total <= self.limits.live:
                return

    def _is_soon_used(self, unit: Unit) -> bool:
        return self._training and self._order.distance(unit) < self.limits.reuse

    @property
    def _order(self) -> UseOrder:
        return self._orders[self._training]

    def release_all(self) -> None:
        """Release every unit that nobody uses."""
        for unit in self.units:
            if unit.users == 0:
                self._forget(unit)
                unit.release()

    def end_step(self) -> None:
        """Release everything: the values are about to change, or the step is over.

        Frames and backwards that an exception left behind end here.
        """
        while self._frames:
            self.leave(self._frames[-1].module)
        for task in list(self._read):
            self._end_reading(task)
        self.release_all()
        for unit in self.units:
            if unit.memory.is_viewed:
                warn_once(
                    f"{unit.names[0]}: a view of its values is kept (param.data, weight.t(), param.numpy(), ...), so "
                    "they stay in memory and in the view as they were then (ZeRO stage 3); keep a clone(), or drop "
                    "the view; give numpy a clone()"
                )


def _show_zeros(unit: Unit) -> None:
    """Let a pass go on without the values, to where all ranks learn that they cannot be read."""
    unit.memory.bring()
    unit.flat.zero_()
    unit.is_whole = True


def _outdated(unit: Unit) -> UsageError:
    return UsageError(
        f"{unit.names[0]}: a view of it that was kept from an earlier forward is used again, and has the values of "
        "then (ZeRO stage 3); make the view anew in each forward"
    )


def _running_task() -> int:
    """Return autograd's number of the running backward, counted from 1; 0 outside of one."""
    return torch._C._current_graph_task_id() + 1


def _top_hooks() -> Any:
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


def _top_hooks_are_of(gatherer: Gatherer) -> bool:
    hooks = _top_hooks()
    return hooks is not None and getattr(hooks[0], "gatherer", None) is gatherer
