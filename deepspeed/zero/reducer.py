"""When gradients are ready, and in which order they are reduced.

Note [Order is law]
Units are reduced in one fixed order, last registered first, in every backward and on every rank. A unit that
is ready early waits for its turn; a unit that saw no gradient on this rank is reduced with zeros when the
backward ends. So ranks whose gradients differ (routing, layer drop, an unused branch) issue the same
collectives and cannot hang.

Note [Backward inside backward]
A reentrant checkpoint runs a backward of its own inside the outer one, and a parameter that several
checkpoints share gets a gradient in each. A gradient that arrives from an inner backward is therefore not
known to be complete, and such a backward reduces everything when its outermost part ends. A unit may have had
its turn by then; what comes late waits on its rank, and the step asks all ranks whether any of them has some.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from deepspeed.zero.gradients import UnitGradients
from deepspeed.zero.landed import LandedGradient
from deepspeed.zero.unit import Unit


class Reducer:
    """Drive the gradients of all units through each backward.

    Args:
        units: in registration order; the same on every rank.
        device: of the flats.
        predivide: divisor applied before a reduction (the rest of the mean is part of the step's scale).
        in_flight: reductions that may run at once; 1 waits for each before the next (no overlap).
        landing_place: returns what keeps a unit's reduced gradient.

    Attributes:
        sync: whether the next backward reduces (False: it accumulates on this rank only).
        on_implicit_backward: called when a backward starts that nobody announced with `begin`.
        on_complete: called with a unit whose parameters all have their gradients of this backward.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        device: torch.device,
        *,
        landing_place: Callable[[Unit], LandedGradient],
        predivide: float = 1.0,
        in_flight: int = 2,
    ) -> None:
        self.gradients = [UnitGradients(unit, landing_place(unit), predivide=predivide) for unit in units]
        self.sync = True
        self.on_implicit_backward: Callable[[], None] = _nothing
        self.on_complete: Callable[[Unit], None] = _nothing
        self._order = list(reversed(self.gradients))
        self._turn = 0
        self._landed = 0
        self._on_host = device.type == "cpu"
        self._kept = False  # the last backward was not reduced, on any rank
        self._in_flight = in_flight
        self._task: int | None = None  # autograd's number of the outermost running backward
        self._eager = True
        self._outermost: int | None = None  # autograd's number of a backward that nobody announced
        self._hooks = [
            param.register_post_accumulate_grad_hook(partial(_tell, ref(self), ref(gradients)))
            for gradients in self.gradients
            for param in gradients.unit.params
        ]

    def watch(self, output: Tensor) -> None:
        """See the start of any backward that runs through `output`, whoever calls it."""
        if not output.is_leaf:  # of a parameter that forward returns, gradients are seen anyway
            output.register_hook(self._output_reached)

    def begin(self) -> None:
        """Open a backward; `end` closes it."""
        self._turn = self._landed = 0
        self._eager = True
        self._task = -1
        for gradients in self.gradients:
            gradients.begin_backward()

    def end(self) -> None:
        """Close the backward: reduce or keep every unit that had no turn yet, and land them all."""
        self._task = None
        while self._turn < len(self._order):
            self._take_turn()
        while self._landed < self._turn:
            self._land_next()
        self._kept = not self.sync
        for gradients in self.gradients:
            if gradients.missing < 0:  # a second gradient came after the unit's turn; it goes with the next
                gradients.keep_local()
            if self.sync:
                gradients.expose()

    def abort(self) -> None:
        """Drop a backward that raised, with the gradients it left."""
        self._task = None
        while self._landed < self._turn:
            self._land_next()
        self.clear()

    def recover(self) -> None:
        """Drop a backward that raised without anybody noticing: ``loss.backward()`` in the user's own try."""
        if torch._C._current_graph_task_id() == -1:
            self._outermost = None
            if self._task is not None:
                self.abort()

    @property
    def holds_local(self) -> bool:
        """Whether this rank has gradients that were never reduced; the other ranks may have none."""
        return any(gradients.holds_local for gradients in self.gradients)

    @property
    def may_be_late(self) -> bool:
        """Whether to ask the device if a rank has late gradients: where asking is free, or they are to be expected."""
        return self._on_host or not self._eager

    def flush(self, *, late: bool = False) -> None:
        """Reduce what earlier backwards kept on all ranks, or with `late` on some: then all ranks call it."""
        if late or self._kept:
            self.sync = True
            self.begin()
            self.end()

    def clear(self) -> None:
        """Forget all gradients."""
        self._kept = False
        for gradients in self.gradients:
            gradients.clear()

    def detach(self) -> None:
        """Remove the hooks from the parameters."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self.on_implicit_backward = _nothing

    @property
    def running(self) -> bool:
        """Whether a backward is open."""
        return self._task is not None

    def _output_reached(self, _grad: Tensor) -> None:
        """Open a backward that the user started with ``loss.backward()``, in the outermost graph task."""
        if self._task is None and self._outermost is None:
            self._outermost = torch._C._current_graph_task_id()
            Variable._execution_engine.queue_callback(self._end_implicit)
        if self._task == -1:
            self._task = torch._C._current_graph_task_id()

    def _begin_implicit(self) -> None:
        """Open a backward at its first gradient: one that accumulates none (torch.autograd.grad) changes nothing."""
        if self._outermost is None:
            self._outermost = torch._C._current_graph_task_id()
            Variable._execution_engine.queue_callback(self._end_implicit)
        self.on_implicit_backward()
        self.begin()
        self._task = self._outermost

    def _end_implicit(self) -> None:
        self._outermost = None
        if self._task is not None:
            self.end()

    def _arrived(self, gradients: UnitGradients, param: nn.Parameter) -> None:
        if not getattr(param, "ds_grad_is_ready", True):
            return
        if self._task is None:
            self._begin_implicit()
        task = torch._C._current_graph_task_id()
        if self._task == -1:
            self._task = task
        elif task != self._task:
            self._eager = False  # see Note [Backward inside backward]
        gradients.missing -= 1
        if gradients.missing == 0:
            self.on_complete(gradients.unit)
        if self._eager:
            while self._turn < len(self._order) and self._order[self._turn].missing <= 0:
                self._take_turn()

    def _take_turn(self) -> None:
        gradients = self._order[self._turn]
        self._turn += 1
        if not self.sync:
            gradients.keep_local()
            self._landed += 1
            return
        gradients.start_reduce()
        while self._turn - self._landed >= self._in_flight:
            self._land_next()

    def _land_next(self) -> None:
        self._order[self._landed].land()
        self._landed += 1


def _tell(
    reducer: ReferenceType[Reducer], gradients: ReferenceType[UnitGradients], param: nn.Parameter
) -> None:
    """Tell the reducer, if there is one still, that a gradient has arrived.

    Python's garbage collector does not see what the hooks of a parameter hold: with more than weak references an
    engine that is let go without `destroy` would stay, with its memory, threads and files.
    """
    receiver, unit_gradients = reducer(), gradients()
    if receiver is not None and unit_gradients is not None:
        receiver._arrived(unit_gradients, param)


def _nothing(*_: object) -> None:
    """What happens at a moment that nobody asked for."""
