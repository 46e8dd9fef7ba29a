"""Where master weights, optimizer states and landed gradients are between steps, and how the update meets them.

In memory they simply are where they are. On disk (`DiskTier`) a leaf's master and states are one parcel and its
unit's gradient is cut into tiles; the update visits one leaf after the other, with the next one on its way in and
the last one on its way out.

Note [Tiles]
Where states are on disk a shard is cut at multiples of a tile into leaves of their own, so that the memory in use
depends neither on the size of the model nor on that of its largest layer. Element-wise optimizers do not see the
cuts. Those that need whole parameters get them whole, and then a tile is a whole shard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from deepspeed.accelerator import get_accelerator
from deepspeed.errors import OffloadError
from deepspeed.offload.tier import DiskTier, NotesFailure, Parcel
from deepspeed.zero.gradients import UnitGradients
from deepspeed.zero.landed import GradientInMemory, GradientOnDisk, GradientOnHost, LandedGradient
from deepspeed.zero.leaves import Leaf, make_leaves, split_leaf, take_state
from deepspeed.zero.unit import Unit

TILE = 2**21
"""Elements of a shard that are updated at a time where states are on disk."""

LANDINGS = 4
"""Tiles of gradients that may be in memory at a time."""

State = dict[Tensor, dict[str, Any]]


def _nothing() -> None:
    """What happens before a change that nobody waits for."""


@dataclass(frozen=True)
class StateHome:
    """Where the states of updated parameters live, if that is not where the parameters are.

    Attributes:
        device: whose memory they are in while they are updated.
        tier: where they are between updates; None: there, too.
        ratio: share of the elements; the rest stays with the parameters.
    """

    device: torch.device
    tier: DiskTier | None = None
    ratio: float = 1.0


class LeafStates(NotesFailure):
    """The states of all leaves.

    Args:
        home: where they go; None leaves them where the parameters are.
        whole_parameters: whether leaves are whole parameters (see `make_leaves`).
        tile: most elements of a leaf on disk.

    Attributes:
        leaves: of each unit, in the order they lie in its shard.
        before_change: is called once, before masters or states change next.
    """

    def __init__(
        self,
        home: StateHome | None = None,
        *,
        whole_parameters: bool = False,
        tile: int = TILE,
    ) -> None:
        self.leaves: dict[Unit, list[Leaf]] = {}
        self.before_change: Callable[[], None] = _nothing
        self.device = None if home is None else home.device
        self._tier = None if home is None else home.tier
        self._landings = None if self._tier is None else self._tier.beside(LANDINGS)
        self._ratio = 0.0 if home is None else home.ratio
        self._seen = self._taken = 0  # elements
        self._turned = False
        self._stream: Any = None  # on which gradients leave
        self._whole_parameters = whole_parameters
        self._tile = tile
        self._born: dict[Unit, Parcel] = {}  # masters of units that have no leaves yet
        self._parcels: dict[Leaf, Parcel] = {}
        self._optimizer: torch.optim.Optimizer | None = None

    # -- where things go --------------------------------------------------------------------------

    def takes(self, numel: int) -> bool:
        """Decide whether the states of a unit with `numel` elements leave the parameters: `ratio` of them do."""
        self._seen += numel
        if self._taken >= self._ratio * self._seen:
            return False
        self._taken += numel
        return True

    def receive(self, unit: Unit) -> None:
        """Take the master of a unit that was just made, to where it stays between updates."""
        self._born[unit] = Parcel()
        if self._tier is not None and unit.has_master:
            with self._tier.noting_failure():
                self._tier.put(self._born[unit], [unit.master])

    def landing_place(self, unit: Unit) -> LandedGradient:
        """Return what keeps a unit's reduced gradient."""
        accumulate = unit.dtypes.accumulate
        if unit not in self._born:
            return GradientInMemory(accumulate)
        if self._landings is not None:
            return GradientOnDisk(self._landings, accumulate, self._tile_of(unit))
        if self._stream is None and unit.flat.device.type != "cpu":
            self._stream = get_accelerator().Stream()
        return GradientOnHost(accumulate, self._stream)

    def lay_out(
        self, unit: Unit, group_of: Sequence[dict[str, Any]], optimizer: torch.optim.Optimizer
    ) -> None:
        """Cut a unit's shard into leaves.

        Args:
            unit: the unit.
            group_of: per parameter of the unit, the param group it belongs to.
            optimizer: that updates the leaves; what it has of parameters already is handed to them.

        Raises:
            OffloadError: the master was not written, or could not be read.
        """
        self._optimizer = optimizer
        born = None if self._tier is None else self._born.get(unit)
        if self._tier is not None and born is not None:
            self._tier.fetch(born)
            self._tier.drop(born)  # its place on the disk is for the leaves
        tile = None if born is None else self._tile_of(unit)
        leaves = make_leaves(unit, group_of, whole_parameters=self._whole_parameters, tile=tile)
        self.leaves[unit] = leaves
        unit.visit_master = partial(self.visit_master, unit)
        for leaf in leaves:
            taken = take_state(leaf, optimizer.state)
            if taken:
                optimizer.state[leaf.tensor] = taken
            if born is not None:
                self._parcels[leaf] = Parcel()
                self._put(leaf)
        if self._tier is not None and born is not None and unit.has_master:
            unit.master.data = unit.master.new_empty(0)

    @property
    def _state(self) -> State:
        return {} if self._optimizer is None else self._optimizer.state

    def _tile_of(self, unit: Unit) -> int:
        return unit.layout.chunk if self._whole_parameters else self._tile

    # -- the update -------------------------------------------------------------------------------

    @property
    def failure(self) -> OffloadError | None:
        """What went wrong with a tier; what is there is of no use from then on."""
        found = [self.noted_failure, *(unit.held.failure for unit in self.leaves)]
        if self._tier is not None:
            found.append(self._tier.failure)
        return next((one for one in found if one is not None), None)

    @property
    def are_away(self) -> bool:
        """Whether leaves must be brought in to be updated, on this rank or on another one that has some."""
        return self._tier is not None and bool(self._born)

    @property
    def share_device(self) -> bool:
        """Whether every leaf, and what it is written out to, is on the device of its parameters."""
        return all(
            unit.master.device == unit.flat.device and not unit.held.nbytes_on_disk for unit in self.leaves
        )

    def will_change(self) -> None:
        """Tell who waits for it that masters or states change now."""
        before_change, self.before_change = self.before_change, _nothing
        before_change()

    @property
    def nbytes_away(self) -> int:
        """Bytes that are on disk, gradients left out."""
        return sum(parcel.nbytes for parcel in self._parcels.values())

    def visit(self, work: Sequence[tuple[Leaf, UnitGradients]]) -> Iterator[tuple[Leaf, Tensor]]:
        """Yield each leaf with its gradient while both are in memory; what was changed is kept.

        The last writes go on while the next forward runs; a failure of theirs is raised by the next step. What is on
        disk is visited there and back in turn, see Note [Buffers remember].

        Raises:
            OffloadError: reading or writing failed.
        """
        self.will_change()
        if self._turned:
            work = work[::-1]
        self._turned = self.are_away and not self._turned
        for index, (leaf, gradients) in enumerate(work):
            self._fetch(leaf)
            if index + 1 < len(work):
                self._prefetch(*work[index + 1])
            for _, grad in gradients.landed.visit(leaf.start, leaf.stop):
                yield leaf, grad if leaf.shape is None else grad.view(leaf.shape)
            if leaf in self._parcels:
                self._put(leaf)

    def settle(self) -> None:
        """Wait until what was changed is where it belongs."""
        if self._tier is not None:
            self._tier.drain()
        self.settle_stored()

    def settle_stored(self) -> None:
        """Wait until new values are where other ranks read them."""
        for unit in self.leaves:
            unit.held.drain()

    def deliver(self, unit: Unit) -> None:
        """Move what an update on the host left in a unit's mirror to the stored shard."""
        if unit.mirror is not None:
            assert unit.held.mine is not None
            unit.held.mine.copy_(unit.mirror, non_blocking=True)

    def split(self, unit: Unit, indices: set[int]) -> None:
        """Give parameters leaves of their own (see `split_leaf`)."""
        leaves = self.leaves[unit]
        if not indices or not leaves or leaves[0].shape is not None:
            return
        with self.noting_failure():
            self.leaves[unit] = [part for leaf in leaves for part in self._split(leaf, indices)]

    def _split(self, leaf: Leaf, indices: set[int]) -> list[Leaf]:
        parcel = self._parcels.get(leaf)
        if parcel is None or self._tier is None:
            return split_leaf(leaf, indices, self._state)
        self._tier.fetch(parcel)
        parts = split_leaf(leaf, indices, self._state)
        if parts == [leaf]:
            self._tier.keep(parcel)
            return parts
        self._tier.drop(self._parcels.pop(leaf))
        for part in parts:
            self._parcels[part] = Parcel()
            self._put(part)
        return parts

    def close(self) -> None:
        """Give the tier's threads, files and memory back."""
        if self._tier is not None:
            self._tier.close()

    # -- single ranges ----------------------------------------------------------------------------

    def visit_master(
        self, unit: Unit, start: int, stop: int, *, changed: bool = False
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield a range of a unit's master in parts that are in memory: where each begins, and its values (flat).

        What cannot be changed is noted as a failure: all ranks change something together.
        """
        with self.noting_failure() if changed else nullcontext():
            for leaf in self._overlapping(unit, start, stop):
                with self.present(leaf, changed=changed):
                    low, high = max(start, leaf.start), min(stop, leaf.stop)
                    yield low, leaf.tensor.view(-1)[low - leaf.start : high - leaf.start]

    def visit_state(
        self, unit: Unit, key: str, start: int, stop: int, *, changed: bool = False
    ) -> Iterator[tuple[int, Tensor]]:
        """Do what `visit_master` does with a state of the optimizer; yields nothing where there is none."""
        for leaf in self._overlapping(unit, start, stop):
            with self.present(leaf, changed=changed):
                value = self._state.get(leaf.tensor, {}).get(key)
                if isinstance(value, Tensor) and value.numel() == leaf.stop - leaf.start:
                    low, high = max(start, leaf.start), min(stop, leaf.stop)
                    yield low, value.view(-1)[low - leaf.start : high - leaf.start]

    def present(self, leaf: Leaf, *, changed: bool) -> AbstractContextManager[None]:
        """Have a leaf's master and states in memory inside."""
        if changed:
            self.will_change()
        parcel = self._parcels.get(leaf)
        if parcel is None or self._tier is None:
            return nullcontext()
        return self._tier.holding(parcel, changed=changed)

    @contextmanager
    def renewing(self, leaf: Leaf) -> Iterator[None]:
        """Have a leaf in memory inside, to change it or give it other states; what it has then is kept."""
        self.will_change()
        self._fetch(leaf)
        yield
        if leaf in self._parcels:
            self._put(leaf)

    def shape_of(self, leaf: Leaf, state: Tensor) -> torch.Size:
        """The shape of one of a leaf's states, which may be away."""
        parcel = self._parcels.get(leaf)
        if parcel is None or parcel.is_here:
            return state.shape
        places = zip(parcel.tensors, parcel.places, strict=True)
        return next((place.shape for tensor, place in places if tensor is state), state.shape)

    def replace(self) -> None:
        """Take note that the optimizer's states are other tensors now; all of them are in memory."""
        for leaf in self._parcels:
            self._fetch(leaf)
            self._put(leaf)
        self.settle()

    def _overlapping(self, unit: Unit, start: int, stop: int) -> list[Leaf]:
        return [leaf for leaf in self.leaves[unit] if leaf.start < stop and start < leaf.stop]

    # -- parcels ----------------------------------------------------------------------------------

    def _fetch(self, leaf: Leaf) -> None:
        if self._tier is not None and leaf in self._parcels:
            self._tier.fetch(self._parcels[leaf])

    def _prefetch(self, leaf: Leaf, gradients: UnitGradients) -> None:
        if self._tier is not None and leaf in self._parcels:
            self._tier.prefetch(self._parcels[leaf])
            gradients.landed.prefetch(leaf.start)

    def _put(self, leaf: Leaf) -> None:
        assert self._tier is not None
        unit = leaf.unit
        master = [leaf.tensor] if unit.has_master else []
        states = [
            value
            for value in self._state.get(leaf.tensor, {}).values()
            if isinstance(value, Tensor) and value.dim() > 0
        ]
        self._tier.put(self._parcels[leaf], [*master, *states])
