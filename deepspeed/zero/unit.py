"""Unit: parameters that travel together, back to back in one flat buffer.

flat     [ p0 ........ | p1 .. | p2 ................ | gap ]    dtype of storage; parameters are views of it
held     [   ......    ]                                       what this rank keeps between uses (held.py);
                                                               the flat itself where parameters stay whole
master   [   ......    ]                                       my shard in the master dtype; what is held itself
                                                               where that is beside the flat, in the same dtype

The memory of a flat comes and goes where a unit is released between uses (memory.py).

Note [Resting]
A unit whose values are kept for a later use, or brought for a backward function, may be released at any time.
Its parameters are therefore of the class of released ones all the same: whoever reads one by its name is seen,
and the unit stays for as long as that reader may need it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deepspeed import comm
from deepspeed.errors import OffloadError, UsageError
from deepspeed.offload.buffers import pinned_empty
from deepspeed.precision.policy import ParamDtypes
from deepspeed.zero.buffers import Scratch
from deepspeed.zero.held import Waitable, wait_for_all
from deepspeed.zero.holder import Holder
from deepspeed.zero.layout import Layout, Piece
from deepspeed.zero.memory import FlatMemory
from deepspeed.zero.meter import GatherMeter
from deepspeed.zero.released import PLAIN, RELEASED, WHOLE, set_class
from deepspeed.zero.slot import Slot, slot_of
from deepspeed.zero.stage import Sharding

_IDS = itertools.count()
"""Numbers of parameters, in the order in which they were laid out."""

Demand = Callable[["Unit"], "AbstractContextManager[object] | None"]


class VisitRange(Protocol):
    """Yield a range of a shard in parts that are in memory: where each begins, and its values."""

    def __call__(self, start: int, stop: int, *, changed: bool = False) -> Iterator[tuple[int, Tensor]]: ...


class Unit:
    """Parameters of one dtype in one flat, this rank's shard of it and the shard's master copy.

    Building a unit moves the parameters into the flat: their values come from the first data-parallel
    rank, and their ``.data`` become views. The master copy is cut from the values as they were given,
    before they are rounded to the storage dtype.

    Args:
        named: the (name, parameter) pairs, in the order of the layout.
        layout: where they lie; its `ranks` is the size of the shard group.
        sharding: the groups of ranks.
        dtypes: number formats.
        device: where the flat lives.
        trained: whether an optimizer updates it; without, the master is the stored shard.
        master_on: where the master lives if it is to be apart from the stored shard, even in the same dtype.
        holder: where what is held lives; None: in memory.
        meter: counts gathers.
        scratch: memory for the values until they are held, where the unit is released at once; None: the flat's.

    Attributes:
        users: those who need the unit whole now; it is not released while there are any.
        is_whole: whether the values of the whole parameters are here.
        is_open: whether the parameters may be read by their names; see note [Resting].
        first_id: number of the first parameter; the others follow.
        updates: how often the values have changed.
        shown: `updates` of the values that the flat has, or had last.
        memory: of the flat.
        label: what errors between ranks call it.
        may_resize: whether its one parameter may take another size: no engine has laid it out yet.
        trained: whether an optimizer updates it.
        mirror: the stored shard in host memory, where the update runs there and the shard is on a device.
        visit_master: yields a range (start, stop) of the master in parts that are in memory; with `changed`, what
            is written to them is kept. The optimizer answers once it has taken the master over.
        demand: asked when a released parameter is used; gives a context in which it is whole, or None.
        lend: given the result of such a use that is a view of the unit; returns what is given instead.
    """

    def __init__(
        self,
        named: Sequence[tuple[str, nn.Parameter]],
        layout: Layout,
        sharding: Sharding,
        dtypes: ParamDtypes,
        device: torch.device,
        *,
        trained: bool = True,
        master_on: torch.device | None = None,
        holder: Holder | None = None,
        meter: GatherMeter | None = None,
        scratch: Scratch | None = None,
    ) -> None:
        self.names = [name for name, _ in named]
        self.params = [param for _, param in named]
        self.label = _common_name(self.names)
        self.layout = layout
        self.sharding = sharding
        self.dtypes = dtypes
        self.users = self.updates = self.shown = 0
        self.is_whole = self.is_open = True
        self.first_id = _numbers(len(named))
        self.demand: Demand = refuse
        self.lend: Callable[[Unit, Any], Any] | None = None
        self.may_resize = False
        self.trained = trained
        self._work: list[Waitable] = []
        self._here = len(self.params)
        self._apart: set[int] = set()
        self._places = [
            (param.shape, torch.empty(param.shape, device="meta").stride(), offset)
            for param, offset in zip(self.params, layout.offsets, strict=True)
        ]
        given = self._given_values(scratch or Scratch(0, device))
        values = given.to(dtypes.storage)
        self.flat = values if scratch is None else torch.empty_like(values)
        near, rows = sharding.hold_group, sharding.spread_group.size
        chunks = values.view(rows, near.size, layout.chunk)[:, near.rank]
        self.held = (holder or Holder()).hold(chunks, sharding, self.label)
        self.master = _master_of(self, given, master_on)
        self.visit_master: VisitRange = partial(visit_range, self.master)
        self.mirror: Tensor | None = None
        if master_on not in (None, device) and self.held.mine is not None:
            self.mirror = pinned_empty(layout.chunk, dtypes.storage).copy_(self.held.mine)
        self._views = self.views(self.flat)
        del chunks  # or the memory would count it among the tensors that stay
        meter = meter or GatherMeter()
        self.memory = FlatMemory(self.flat, meter)
        self._move_parameters()
        if sharding.releases:
            meter.gathered(layout.total, dtypes.storage.itemsize)
            self.settle()
            self.release()

    def _given_values(self, scratch: Scratch) -> Tensor:
        """Return the parameters' values in one new flat, equal on all data-parallel ranks."""
        dtype = self.params[0].dtype
        for param in self.params[1:]:
            dtype = torch.promote_types(dtype, param.dtype)
        given = scratch.take(self.layout.total, dtype)
        self.zero_gaps(given)
        everyone_has = True  # each value is read from where all ranks keep it
        decides = self.sharding.everyone.rank == 0
        with torch.no_grad():
            for param, view in zip(self.params, self.views(given), strict=True):
                slot = slot_of(param)
                if slot is None or slot.unit.is_open:
                    everyone_has = False
                    if decides:
                        view.copy_(param)
                else:
                    slot.unit.read(slot.index, view)
        for group in (self.sharding.shard_group, self.sharding.replica_group):
            if group.size > 1 and not everyone_has:
                comm.broadcast(
                    given, group.first_rank, group=group.process_group, label=f"values of {self.label}"
                )
        return given

    def _move_parameters(self) -> None:
        for index, (param, view) in enumerate(zip(self.params, self._views, strict=True)):
            old = slot_of(param)
            param.grad = None
            set_class(param, WHOLE if self.sharding.marks_parameters else PLAIN)
            param.data = view
            self.memory.guarded += 1
            param.ds_slot = Slot(self, index)  # type: ignore[attr-defined]
            if old is not None:
                old.unit.lose_one()
        self._versions = [param._version for param in self.params]

    def lose_one(self) -> None:
        """Take note that a parameter has moved to another unit; with the last one the memory goes."""
        self._here -= 1
        self.memory.guarded -= 1
        if self._here == 0:
            self.held.drop()

    def dismiss(self) -> None:
        """Let the parameters go, as plain ones with the values they show; the next engine lays them out."""
        for param in self.params:
            set_class(param, PLAIN)
            del param.ds_slot  # type: ignore[attr-defined]
            self.lose_one()
        if self.sharding.releases:
            self.memory.free()

    # -- where things lie -------------------------------------------------------------------------

    def views(self, flat: Tensor) -> list[Tensor]:
        """View a whole flat (or a gradient laid out like it) as the parameters, in their shapes."""
        start = flat.storage_offset()
        return [
            flat.as_strided(shape, strides, start + offset)  # a third of the time of a slice and a view
            for shape, strides, offset in self._places
        ]

    def shape_of(self, index: int) -> torch.Size:
        """A parameter's shape as it is laid out."""
        return self._views[index].shape

    def zero_gaps(self, flat: Tensor) -> None:
        """Clear what belongs to no parameter, so that norms over a whole shard are right."""
        for start, stop in self.layout.gaps:
            flat[start:stop].zero_()

    def my_pieces(self) -> list[Piece]:
        """Pieces of the parameters in this rank's shard."""
        return self.layout.pieces(self.sharding.shard_group.rank)

    @property
    def has_master(self) -> bool:
        """Whether the master is a copy, beside what is held."""
        return self.trained and self.master is not self.held.mine

    @property
    def is_gathering(self) -> bool:
        """Whether a gather is under way."""
        return bool(self._work)

    # -- gather and release -----------------------------------------------------------------------

    def start_gather(self) -> None:
        """Begin to bring the parameters in; `gather` completes it. A collective, unless what is held is read alone."""
        if self.is_whole or self._work:
            return
        self.memory.bring()
        self.shown = self.updates
        self._work = self.held.start(self.flat.view(-1, self.sharding.hold_group.size, self.layout.chunk))
        self.is_whole = not self._work

    def bring(self) -> None:
        """Make the values whole, waiting for a gather that is under way; names stay as they are.

        Raises:
            OffloadError: they could not be read; nothing is here then.
        """
        self.start_gather()
        work, self._work = self._work, []
        try:
            wait_for_all(work)
        except OffloadError:
            self.memory.free()
            raise
        self.is_whole = True

    def gather(self) -> None:
        """Make the parameters whole, for whoever reads them."""
        self.bring()
        if not self.is_open:
            self.is_open = True
            self._mark(WHOLE)

    def rest(self) -> None:
        """Keep the values, and let nobody read the parameters by name. See note [Resting]."""
        if self.is_open and self.sharding.releases:
            self.adopt_edits()
            self.is_open = False
            self._mark(RELEASED)

    def _mark(self, state: str) -> None:
        for index, param in enumerate(self.params):
            if index not in self._apart:
                set_class(param, state)

    def release(self) -> None:
        """Free the whole parameters, having taken over what was edited in them; nothing where they stay."""
        if not self.sharding.releases:
            return
        if self._work:
            self.bring()
        if self.is_whole:
            self.rest()
            self.is_whole = False
        self.memory.free()

    def read(self, index: int, out: Tensor) -> None:
        """Fill `out` with one parameter without gathering the unit; a collective, unless what is held is read alone.

        Args:
            index: of the parameter.
            out: contiguous, of the parameter's shape, any dtype.
        """
        if self.is_whole:
            out.copy_(self._views[index])
            return
        if len(self.params) == 1 and not self.held.reads_alone:
            out.copy_(self.views(self._gathered())[0])
            return
        near, alone = self.sharding.hold_group, self.held.reads_alone
        whole = self.flat.new_zeros(self.layout.numels[index])
        for chunk in range(0 if alone else near.rank, self.layout.ranks, 1 if alone else near.size):
            row, rank = divmod(chunk, near.size)
            for piece in self.layout.pieces(chunk):
                if piece.index == index:
                    part = whole[piece.param_start : piece.param_stop]
                    self.held.read(rank, row * self.layout.chunk + piece.shard_start, part)
        if not alone and whole.numel() > 0:
            # The sum is exact: where a rank has its bytes, all others have zeros.
            comm.all_reduce(whole.view(torch.uint8), group=near.process_group, label=self.names[index])
        out.copy_(whole.view(out.shape))

    def _gathered(self) -> Tensor:
        """Return the whole values in memory of their own: one collective, however many ranks there are."""
        whole = torch.empty_like(self.flat)
        wait_for_all(self.held.start(whole.view(-1, self.sharding.hold_group.size, self.layout.chunk)))
        return whole

    def show(self, index: int) -> None:
        """Make one parameter whole, in memory of its own, until `hide`."""
        param = self.params[index]
        value = torch.empty(param.shape, dtype=self.flat.dtype, device=self.flat.device)
        self.read(index, value)
        self._apart.add(index)
        self.memory.guarded -= 1
        set_class(param, WHOLE)
        param.data = value

    def hide(self, index: int) -> None:
        """Undo `show`; what was changed and not written is forgotten."""
        param = self.params[index]
        self._versions[index] = param._version
        param.data = self._views[index]
        self._apart.discard(index)
        self.memory.guarded += 1
        set_class(param, WHOLE if self.is_open else RELEASED)

    def is_shown(self, index: int) -> bool:
        """Whether a parameter can be read."""
        return self.is_whole or index in self._apart

    # -- changes ----------------------------------------------------------------------------------

    def write(self, index: int, value: Tensor) -> None:
        """Set a parameter's stored weight and its master, `value` (its shape) being equal on all ranks.

        What is equal to the stored weight already leaves the master its finer value. To be called in `changing`.
        """
        flat_value = value.detach().reshape(-1)
        if self.is_whole:
            self._views[index].copy_(value.detach())
        near, spread = self.sharding.hold_group, self.sharding.spread_group
        chunks = range(near.rank, near.size * spread.size, near.size) if self.sharding.releases else ()
        for row, chunk in enumerate(chunks):
            for piece in self.layout.pieces(chunk):
                if piece.index == index:
                    part = flat_value[piece.param_start : piece.param_stop]
                    self.held.write(row * self.layout.chunk + piece.shard_start, part)
        for piece in self.my_pieces() if self.has_master else ():
            if piece.index == index:
                _write_master(self, piece, flat_value)

    def settle(self) -> None:
        """Wait until no rank is still reading or writing what ranks hold. A collective."""
        self.held.settle()

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Change what is held inside; nobody reads it meanwhile. A collective."""
        self.settle()
        yield
        if self.mirror is not None:
            assert self.held.mine is not None
            self.mirror.copy_(self.held.mine)
        self.updates += 1
        self.settle()

    def adopt_edits(self) -> None:
        """Take over into the master shard what the user wrote into parameters since the last call.

        Note [Edits of parameters]
            ``param.mul_()``, ``load_state_dict`` and ``nn.init`` raise a parameter's version; updates go
            through the flat and do not. So an edit is seen and reaches the master copy, which would undo it
            at the next step otherwise. It must be the same on every rank. ``param.data`` has no version:
            what is written through it where the master is a copy must be set with safe_set_full_fp32_param.

        Raises:
            UsageError: a parameter's memory was replaced (``.to()``, ``.half()``, ``param.data = ...``).
        """
        if not self.is_open:  # those of a resting unit were taken over when it came to rest
            return
        self._check_places()
        versions = [param._version for param in self.params]
        if versions == self._versions:
            return
        before, self._versions = self._versions, versions
        with self.changing():
            for index, (old, new) in enumerate(zip(before, versions, strict=True)):
                if old != new:
                    self.write(index, self.params[index])

    def forget_edits(self, index: int) -> None:
        """Take edits of a parameter as taken over; it shows the flat again where other memory was put in."""
        param = self.params[index]
        if self.is_open and index not in self._apart and param.untyped_storage()._cdata != self.memory.key:
            param.data = self._views[index]
        self._versions[index] = param._version

    def _check_places(self) -> None:
        key = self.memory.key
        for index, (name, param) in enumerate(zip(self.names, self.params, strict=True)):
            if index not in self._apart and param.untyped_storage()._cdata != key:
                raise UsageError(
                    f"{name}: expected its memory where deepspeed.initialize laid it out, but it was replaced "
                    "(model.to(), model.half(), param.data = ...); change the model before initialize, and "
                    "values in place: param.copy_(...)"
                )

    def publish(self, *, async_op: bool = False) -> dist.Work | None:
        """Spread this rank's shard to the ranks that hold a copy of it, once it was updated in storage."""
        self.updates += 1
        work = self.held.spread(f"step of {self.label}")
        if work is not None and not async_op:
            work.wait()
        return work


def _master_of(unit: Unit, given: Tensor, device: torch.device | None) -> Tensor:
    """Return this rank's shard of the given values in the master dtype; empty if nobody updates it.

    It is a copy if it is asked for on a device, and where what is held is no memory to be updated.
    """
    mine, dtypes = unit.held.mine, unit.dtypes
    if mine is not None and (not unit.trained or (device is None and dtypes.master == dtypes.storage)):
        return mine
    if not unit.trained:
        return given.new_empty(0)
    chunk, rank = unit.layout.chunk, unit.sharding.shard_group.rank
    return given[rank * chunk : (rank + 1) * chunk].to(device or given.device, dtypes.master, copy=True)


def _common_name(names: Sequence[str]) -> str:
    """Name parameters by the innermost module that all of them are in, or else by the first."""
    if len(names) == 1:
        return names[0]
    paths = [name.split(".")[:-1] for name in names]
    shared = [
        steps[0]
        for steps in itertools.takewhile(lambda steps: len(set(steps)) == 1, zip(*paths, strict=False))
    ]
    return ".".join(shared) or f"{names[0]} and {len(names) - 1} more"


def visit_range(
    shard: Tensor, start: int, stop: int, *, changed: bool = False
) -> Iterator[tuple[int, Tensor]]:
    """Yield a range of a shard that is in memory."""
    yield start, shard[start:stop]


def _write_master(unit: Unit, piece: Piece, flat_value: Tensor) -> None:
    """Set a piece of the master where the stored weight changes; elsewhere it keeps its finer value."""
    for start, master in unit.visit_master(piece.shard_start, piece.shard_stop, changed=True):
        offset = start - piece.shard_start + piece.param_start
        part = flat_value[offset : offset + master.numel()].to(master.device)
        changed = master.to(unit.dtypes.storage) != part.to(unit.dtypes.storage)
        master.copy_(torch.where(changed, part.to(master.dtype), master))


def _numbers(count: int) -> int:
    """Take `count` numbers that follow each other; return the first."""
    return min(next(_IDS) for _ in range(count))


def refuse(_unit: Unit) -> None:
    """Give nobody a released parameter: what a unit does while nobody gathers it on demand."""
