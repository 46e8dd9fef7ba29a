"""Put the values of a checkpoint into a model and its optimizer, whatever layout wrote them and whatever has them now.

    for each unit:   ranges that this rank keeps -> read in place -> stored weights from masters -> spread to copies

Everything goes by parameter name. A rank reads its own ranges only, some blocks at a time.

Note [A rank that cannot read]
Ranks change units together. One that meets a damaged file reads nothing more, but takes part until all have
finished; then the error is raised on every rank (`Restorer.failure`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from deepspeed.checkpoint.contents import leaf_shape, names_of
from deepspeed.checkpoint.manifest import MASTER, STATE, WEIGHT, Value
from deepspeed.checkpoint.reading import Reader
from deepspeed.errors import CheckpointError, OffloadError, UsageError
from deepspeed.zero.access import changing
from deepspeed.zero.leaves import Leaf
from deepspeed.zero.optimizer import ZeroOptimizer
from deepspeed.zero.slot import slot_of, trained_slot
from deepspeed.zero.unit import Unit


@dataclass
class Fit:
    """How the names of a model and of a checkpoint fit.

    Attributes:
        names: of the model's tensors -> the checkpoint's.
        missing: tensors of the model that the checkpoint has not.
        unexpected: tensors of the checkpoint that the model has not.
    """

    names: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)

    def complaint(self) -> str:
        """Say what does not fit."""
        parts = [
            f"{what}: {', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"
            for what, names in (("missing in it", self.missing), ("not in the model", self.unexpected))
            if names
        ]
        return "; ".join(parts)


class Restorer:
    """Load one checkpoint into one engine's module and optimizer.

    Args:
        reader: of the checkpoint.
        module: the model.
        reshaped: another shape than the saved one is no error: such tensors are left as they are.

    Attributes:
        fit: how the names fit.
        failure: the first error that reading met, or the disk that states are offloaded to.
        fresh: trained parameters whose optimizer states the checkpoint has not.
    """

    def __init__(self, reader: Reader, module: nn.Module, *, reshaped: bool = False) -> None:
        self.failure: CheckpointError | OffloadError | None = None
        self.fresh: list[str] = []
        self._reader = reader
        self._values = reader.manifest.values
        self._module = module
        self._state: dict[str, Any] = module.state_dict(keep_vars=True)
        self._names = names_of(module, self._state)
        self.fit = self._match(reshaped=reshaped)

    # -- names and shapes -------------------------------------------------------------------------

    def _match(self, *, reshaped: bool) -> Fit:
        saved = self._reader.manifest.parameters
        known = {alias: name for name, about in saved.items() for alias in (name, *about["aliases"])}
        fit = Fit()
        tensors = {name: value for name, value in self._state.items() if isinstance(value, Tensor)}
        tensors |= {name: param for name, param in self._module.named_parameters() if name not in tensors}
        for name, tensor in tensors.items():
            aliases = [name, *self._names.get(id(tensor), ())]
            match = next((known[alias] for alias in aliases if alias in known), None)
            if match is None:
                if not (self._frozen_are_left_out and _is_frozen(tensor)):
                    fit.missing.append(name)
                continue
            mine, shape = _shape_of(tensor), saved[match]["shape"]
            if mine == shape:
                fit.names[name] = match
            elif not reshaped:
                raise UsageError(
                    f"{self._reader.folder}: {name}: expected shape {mine} of the model, but {shape} was saved; "
                    "load it into the model it was saved from, or with a custom_load_fn that makes it fit"
                )
        used = set(fit.names.values())
        fit.unexpected = [name for name in saved if name not in used]
        return fit

    @property
    def _frozen_are_left_out(self) -> bool:
        """Whether frozen weights may be missing without their names being told: the original saves none."""
        about = self._reader.manifest.about
        return "imported" in about and bool(about["frozen_left_out"])

    def _find(self, unit: Unit, index: int, kinds: Iterable[str]) -> Value | None:
        """Return the first of some kinds of values that the checkpoint has of a parameter."""
        found = self._find_all(unit.names[index], kinds)
        return found[0] if found else None

    def _find_all(self, name: str, kinds: Iterable[str]) -> list[Value]:
        """Return those of some kinds of values that the checkpoint has of a tensor of the model."""
        saved = self.fit.names.get(name, "")
        return [self._values[kind][saved] for kind in kinds if saved in self._values.get(kind, {})]

    def _best(self, name: str, dtype: torch.dtype) -> Value | None:
        """Return the saved weight of a tensor that is nearest to `dtype`: that dtype, else the finest."""
        values = self._find_all(name, (MASTER, WEIGHT))
        same = (value for value in values if value.torch_dtype == dtype)
        return next(same, values[0] if values else None)

    # -- weights ----------------------------------------------------------------------------------

    def restore(self, units: list[Unit], optimizer: ZeroOptimizer | None, *, states: bool) -> None:
        """Restore all units and what lies in none of them.

        Args:
            units: all of the engine's.
            optimizer: of the trained ones.
            states: restore the optimizer's states too.
        """
        trained = set() if optimizer is None else set(optimizer.units)
        with torch.no_grad():
            for unit in units:
                with changing(unit):
                    if optimizer is not None and unit in trained:
                        self._restore_trained(unit, optimizer, states=states)
                    else:
                        self._restore_stored(unit)
            if optimizer is not None:
                optimizer.refill_groups()
                self.failure = self.failure or optimizer.states.failure
            self._restore_rest()

    def _restore_trained(self, unit: Unit, optimizer: ZeroOptimizer, *, states: bool) -> None:
        if states:
            self._separate(unit, optimizer)
        with optimizer.states.noting_failure():
            for leaf in optimizer.states.leaves[unit]:
                with optimizer.states.renewing(leaf):
                    self._restore_leaf(leaf, optimizer, states=states)
        optimizer.states.deliver(unit)
        unit.publish()

    def _restore_leaf(self, leaf: Leaf, optimizer: ZeroOptimizer, *, states: bool) -> None:
        dtype, names = leaf.tensor.dtype, leaf.unit.names
        self._ask_pieces(leaf, leaf.tensor, {p.index: self._best(names[p.index], dtype) for p in leaf.pieces})
        if states:
            self._restore_states(leaf, optimizer)
        self._settle()
        leaf.write_out()

    def _restore_stored(self, unit: Unit) -> None:
        """Fill what this rank keeps of a unit that nobody updates."""
        dtype = unit.dtypes.storage
        values = [self._best(name, dtype) for name in unit.names]
        if not unit.sharding.releases:
            for view, value in zip(unit.views(unit.flat), values, strict=True):
                self._ask(value, 0, view.reshape(-1))
            self._settle()
            return
        near, spread = unit.sharding.hold_group, unit.sharding.spread_group
        for row, chunk in enumerate(range(near.rank, near.size * spread.size, near.size)):
            for piece in unit.layout.pieces(chunk):
                part = torch.empty(piece.numel, dtype=dtype, device=unit.flat.device)
                if self._read(values[piece.index], piece.param_start, part):
                    unit.held.write(row * unit.layout.chunk + piece.shard_start, part)

    def _restore_rest(self) -> None:
        """Fill buffers, and parameters that are in no unit."""
        theirs = {id(one) for one in (*self._module.parameters(), *self._module.buffers())}
        for name, tensor in self._state.items():
            if not isinstance(tensor, Tensor) or slot_of(tensor) is not None:
                continue
            value = self._best(name, tensor.dtype)
            if value is None:
                continue
            if id(tensor) in theirs and tensor.is_contiguous():
                self._read(value, 0, tensor.detach().view(-1))
            else:  # the module makes it up when asked
                whole = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
                self._read(value, 0, whole.view(-1))
                self._module.load_state_dict({name: whole}, strict=False)

    def whole(self) -> dict[str, Tensor]:
        """Read all weights whole, by all the names that they were saved under."""
        made = {}
        for name, value in {**self._values.get(MASTER, {}), **self._values.get(WEIGHT, {})}.items():
            made[name] = torch.empty(value.shape, dtype=value.torch_dtype)
            self._read(value, 0, made[name].view(-1))
            aliases = self._reader.manifest.parameters[name]["aliases"]
            made.update(dict.fromkeys(aliases, made[name]))
        return made

    # -- states of the optimizer ------------------------------------------------------------------

    def _saved_states(self, unit: Unit, index: int) -> tuple[tuple[str, ...], str]:
        """Describe the states saved of a parameter: the keys, and those that are numbers with their values."""
        name = self.fit.names.get(unit.names[index], "")
        keys = tuple(
            kind.removeprefix(STATE)
            for kind, named in self._values.items()
            if kind.startswith(STATE) and name in named
        )
        return keys, repr(self._reader.manifest.scalars.get(name, {}))

    def _separate(self, unit: Unit, optimizer: ZeroOptimizer) -> None:
        """Give parameters whose states differ from the others' a leaf of their own: a leaf has one step count."""
        kinds = {piece.index: self._saved_states(unit, piece.index) for piece in unit.my_pieces()}
        if kinds:
            usual, _ = Counter(kinds.values()).most_common(1)[0]
            optimizer.states.split(unit, {index for index, kind in kinds.items() if kind != usual})

    def _restore_states(self, leaf: Leaf, optimizer: ZeroOptimizer) -> None:
        unit, first = leaf.unit, leaf.pieces[0].index
        keys, _ = self._saved_states(unit, first)
        numbers = self._reader.manifest.scalars.get(self.fit.names.get(unit.names[first], ""), {})
        old = optimizer.state.pop(leaf.tensor, {})
        if not keys and not numbers:
            self.fresh += [unit.names[piece.index] for piece in leaf.pieces]
            return
        made: dict[str, Any] = {
            key: _number(dtype, value, optimizer.device_of_number(leaf, key))
            for key, (dtype, value) in numbers.items()
        }
        for key in keys:
            values = {piece.index: self._find(unit, piece.index, [STATE + key]) for piece in leaf.pieces}
            made[key] = self._restored_state(leaf, optimizer, values, old.get(key))
        optimizer.state[leaf.tensor] = made

    def _restored_state(
        self, leaf: Leaf, optimizer: ZeroOptimizer, values: dict[int, Value | None], old: Any
    ) -> Tensor:
        value = values[leaf.pieces[0].index]
        assert value is not None
        piece = leaf.pieces[0]
        elementwise = value.shape == list(leaf.unit.shape_of(piece.index))
        shape = leaf_shape(leaf) if elementwise else torch.Size(value.shape)
        dtype = value.torch_dtype
        if dtype.is_floating_point:
            dtype = optimizer.dtype_of_state(leaf)
        state = old if isinstance(old, Tensor) and old.shape == shape else None
        if state is None:
            state = torch.zeros(shape, dtype=dtype, device=leaf.tensor.device)
        if elementwise:
            self._ask_pieces(leaf, state, values)
        else:
            self._ask(value, 0, state.view(-1))
        return state

    # -- reading ----------------------------------------------------------------------------------

    def _ask_pieces(self, leaf: Leaf, into: Tensor, values: dict[int, Value | None]) -> None:
        flat = into.detach().view(-1)
        for piece in leaf.pieces:
            low = piece.shard_start - leaf.start
            self._ask(values[piece.index], piece.param_start, flat[low : low + piece.numel])

    def _read(self, value: Value | None, start: int, out: Tensor) -> bool:
        """Fill `out`; return whether that was possible."""
        self._ask(value, start, out)
        self._settle()
        return value is not None and self.failure is None

    def _ask(self, value: Value | None, start: int, out: Tensor) -> None:
        """Fill `out`, if that is possible, by the time `_settle` returns."""
        if value is not None:
            self._attempt(lambda: self._reader.ask(value, start, out))

    def _settle(self) -> None:
        self._attempt(self._reader.settle)

    def _attempt(self, action: Callable[[], None]) -> None:
        """Read, unless that failed before."""
        if self.failure is None:
            try:
                action()
            except CheckpointError as error:
                self.failure = error


def _shape_of(tensor: Tensor) -> list[int]:
    slot = slot_of(tensor)
    return list(tensor.shape if slot is None else slot.unit.shape_of(slot.index))


def _is_frozen(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) and trained_slot(tensor) is None


def _number(dtype: str | None, value: Any, device: torch.device) -> Any:
    """Make a state that is a number."""
    return value if dtype is None else torch.tensor(value, dtype=getattr(torch, dtype), device=device)
