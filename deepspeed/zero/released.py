"""Parameters that know whether their values are here.

    plain      the class the user gave it (nn.Parameter, say)
    whole      a subclass with the attributes that scripts ask of sharded parameters; torch treats it as plain
    released   a subclass of that which lets nobody read what is not here

A parameter changes class when its unit is gathered and released, so a whole one costs nothing extra. Its shape,
dtype and so on are right at all times. What an operation on a released one does depends on where it happens:
inside a forward the unit is gathered for it, elsewhere it is refused with the name of the parameter.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from deepspeed.common.nested import tensors_in
from deepspeed.errors import UsageError
from deepspeed.zero.slot import Slot

if TYPE_CHECKING:
    from deepspeed.zero.unit import Unit

MAKE_PARAMETER = nn.Parameter.__new__.__code__
PLAIN, WHOLE, RELEASED = "plain", "whole", "released"


class ZeroParamStatus(Enum):
    """Whether a parameter's values are here."""

    AVAILABLE = 1
    NOT_AVAILABLE = 2
    INFLIGHT = 3


class ShardedParameter:
    """What a parameter has at stage 3 beside what every parameter has."""

    ds_slot: Slot
    ds_base: type
    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def ds_id(self) -> int:
        """A number of its own, in the same order on every rank."""
        return self.ds_slot.unit.first_id + self.ds_slot.index

    @property
    def ds_shape(self) -> torch.Size:
        """The whole parameter's shape, as it is laid out."""
        return self.ds_slot.unit.shape_of(self.ds_slot.index)

    @property
    def ds_numel(self) -> int:
        """The whole parameter's number of elements."""
        return self.ds_slot.unit.layout.numels[self.ds_slot.index]

    @property
    def ds_status(self) -> ZeroParamStatus:
        """Whether the values are here."""
        here = not isinstance(self, ReleasedParameter)
        return ZeroParamStatus.AVAILABLE if here else ZeroParamStatus.NOT_AVAILABLE

    @property
    def ds_tensor(self) -> Tensor:
        """This rank's piece of the stored weight, flat; empty where it has none, a copy where it is on disk."""
        piece = self.ds_slot.my_piece()
        start, stop = (0, 0) if piece is None else (piece.shard_start, piece.shard_stop)
        return self.ds_slot.unit.held.read_mine(start, stop)

    @property
    def ds_active_sub_modules(self) -> set[Any]:
        """Modules that need the parameter now; kept per unit, so there is nothing to see or to clear here."""
        return set()

    @property
    def ds_persist(self) -> bool:
        """Whether it stays whole between uses."""
        return not self.ds_slot.unit.sharding.releases

    def detach(self) -> Tensor:
        """Detach as usual. ``nn.Parameter(param)`` gets a copy: the values here go when the unit is released, and
        the class stays, because ``nn.Parameter`` insists on it."""
        if torch.compiler.is_compiling() or sys._getframe(1).f_code is not MAKE_PARAMETER:
            return super().detach()  # type: ignore[misc,no-any-return]
        if isinstance(self, ReleasedParameter):
            raise _refusal([self], "nn.Parameter")
        return super().detach().clone().as_subclass(type(self))  # type: ignore[misc,no-any-return]

    def partition_numel(self) -> int:
        """Elements that each rank would hold of it alone, padding included."""
        return -(-self.ds_numel // self.ds_slot.unit.layout.ranks)

    def all_gather(self, param_list: Iterable[nn.Parameter] | None = None, **_: Any) -> None:
        """Make this parameter, or those of a list, whole until `partition`; all ranks call it."""
        for unit in _units([self] if param_list is None else param_list):
            unit.users += 1
            unit.gather()

    def partition(
        self, param_list: Iterable[nn.Parameter] | None = None, has_been_updated: bool = False, **_: Any
    ) -> None:
        """Undo `all_gather`; in-place changes are kept."""
        for unit in _units([self] if param_list is None else param_list):
            unit.users = max(0, unit.users - 1)
            if unit.users == 0:
                unit.release()
            if has_been_updated:
                unit.settle()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Copy the whole values into a plain parameter.

        Note [Copies]
            Before an engine lays parameters out, models are put together: peft copies the modules that it is to
            train. So such a parameter is gathered for its copy, which all ranks make. Later a copy is refused
            while the values are not here: often one rank wants it alone.
        """
        made_of_a_gathered_one = not hasattr(self, "ds_slot")
        together = not made_of_a_gathered_one and self.ds_slot.unit.may_resize
        if together:
            self.all_gather()
        try:
            with _all_whole(_released_among(self), copy.deepcopy):
                copied = self.ds_base(self.data.clone(), self.requires_grad)  # type: ignore[attr-defined]
        finally:
            if together:
                self.partition()
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        if isinstance(self, ReleasedParameter):
            raise _refusal([self], "pickle")
        return nn.Parameter(self.data.clone(), self.requires_grad).__reduce_ex__(protocol)  # type: ignore[attr-defined]


class ReleasedParameter(ShardedParameter):
    """A sharded parameter whose values are not here."""

    @classmethod
    def __torch_function__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        answer = _answer(func, args, kwargs)
        if answer is not VALUES_NEEDED:
            return answer
        with _all_whole(_released_among((args, kwargs)), func) as units:
            return _lent(func(*args, **kwargs), units)

    def as_subclass(self, cls: type) -> Any:
        """Refuse: torch asks nobody about this one."""
        raise _refusal([self], "as_subclass")

    def set_(self, *_: Any, **__: Any) -> Any:
        """Refuse: torch asks nobody about this one."""
        raise _refusal([self], "set_")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Parameter {self.ds_slot.name} of shape {tuple(self.ds_shape)}, released"


class Alias(Tensor):
    """What ``detach()`` and ``.data`` give of a released parameter: it can be read when the unit is whole."""

    ds_slot: Slot

    @classmethod
    def of(cls, source: Tensor) -> Tensor:
        """Return an alias of a released parameter or of another alias."""
        with torch._C.DisableTorchFunctionSubclass():
            # as_subclass() would keep what it is made of, too, and so count as two views.
            alias = Tensor._make_subclass(cls, source.detach())
        alias.ds_slot = source.ds_slot  # type: ignore[attr-defined]
        alias.ds_slot.unit.memory.guarded += 1
        return alias

    def __del__(self) -> None:
        slot = self.__dict__.get("ds_slot")
        if slot is not None:
            slot.unit.memory.guarded -= 1

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        answer = _answer(func, args, kwargs)
        if answer is not VALUES_NEEDED:
            return answer
        with (
            _all_whole(_released_among((args, kwargs)), func) as units,
            torch._C.DisableTorchFunctionSubclass(),
        ):
            return _lent(func(*args, **kwargs), units)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Tensor of {self.ds_slot.name}, shape {tuple(self.shape)}, released"

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise _refusal([self], "pickle")


@cache
def leave_graphs() -> None:
    """From now on torch traces what is done with released parameters: see that it does not trace how."""
    for cls in (ReleasedParameter, Alias):
        traced = cls.__torch_function__.__func__  # type: ignore[attr-defined]
        cls.__torch_function__ = classmethod(torch.compiler.disable(traced))  # type: ignore[assignment]


VALUES_NEEDED = object()


def _answer(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the result of an operation that reads no values; VALUES_NEEDED of any other."""
    if func in METADATA:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    if func in ALIASES:
        return Alias.of(args[0])
    if func in MOVES and _stays(func, *args, **kwargs):
        return args[0]
    if func is pad and _pads_nothing(*args, **kwargs):  # transformers, of the bias of every output embedding
        return args[0]
    if func == SET_DATA and _is_of(args[0], args[1]):  # what Module.to() does with a parameter that stays
        return None
    return VALUES_NEEDED


def _pads_nothing(tensor: Any, widths: Any, *_: Any, **__: Any) -> bool:
    return not any(widths)


def _is_of(param: Any, value: Any) -> bool:
    """Whether a value to set is the parameter itself, or what it gave as its ``.data``."""
    return value is param or (isinstance(value, Alias) and value.ds_slot is getattr(param, "ds_slot", None))


@cache
def _class_for(base: type, state: str) -> type:
    mixin = ShardedParameter if state == WHOLE else ReleasedParameter
    return type(f"{state.capitalize()}{base.__name__}", (mixin, base), {"ds_base": base})


def set_class(param: nn.Parameter, state: str) -> None:
    """Turn a parameter into one that is plain, whole or released."""
    base = getattr(type(param), "ds_base", type(param))
    param.__class__ = base if state == PLAIN else _class_for(base, state)


def _units(params: Iterable[Any]) -> list[Unit]:
    return list(dict.fromkeys(param.ds_slot.unit for param in params))


def _released_among(values: Any) -> Iterator[Any]:
    if isinstance(values, (ReleasedParameter, Alias)):
        if not values.ds_slot.unit.is_open:
            yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _released_among(value)
    elif isinstance(values, dict):
        yield from _released_among(list(values.values()))


class _all_whole:
    """Context in which the units of released tensors are whole, where that can be had."""

    def __init__(self, released: Iterable[Any], func: Callable[..., Any]) -> None:
        self._contexts = []
        tensors = list(released)
        self._units = _units(tensors)
        for unit in self._units:
            context = unit.demand(unit)
            if context is None:
                raise _refusal([one for one in tensors if one.ds_slot.unit is unit], _name_of(func))
            self._contexts.append(context)

    def __enter__(self) -> list[Unit]:
        for context in self._contexts:
            context.__enter__()
        return self._units

    def __exit__(self, *error: Any) -> None:
        for context in reversed(self._contexts):
            context.__exit__(*error)


def _lent(result: Any, units: list[Unit]) -> Any:
    """Return the result of an operation, or what units that it is a view of make of it."""
    for unit in units:
        if unit.lend is not None and any(_is_view(one, unit) for one in tensors_in(result)):
            result = unit.lend(unit, result)
    return result


def _is_view(tensor: Tensor, unit: Unit) -> bool:
    return tensor.layout == torch.strided and tensor.untyped_storage()._cdata == unit.memory.key


def _refusal(tensors: list[Any], action: str) -> UsageError:
    names = ", ".join(dict.fromkeys(one.ds_slot.name for one in tensors))
    if action in MOVING:
        return UsageError(
            f"{names}: expected to stay as deepspeed.initialize laid it out, got .{action}() to another dtype or "
            "device; change the model before initialize"
        )
    ranks = tensors[0].ds_slot.unit.layout.ranks
    where = f"on {ranks} ranks" if ranks > 1 else "off the device"
    return UsageError(
        f"{names}: expected whole for {action}, but its values lie {where} between uses (ZeRO stage 3); on every "
        "rank, put it inside "
        "`with deepspeed.zero.GatheredParameters(param, modifier_rank=0):`, or into the module's forward"
    )


def _name_of(func: Callable[..., Any]) -> str:
    return getattr(func, "__name__", str(func)).replace("__get__", "this attribute")


def _stays(func: Callable[..., Any], tensor: Tensor, *args: Any, **kwargs: Any) -> bool:
    """Whether a move or cast would change neither device nor dtype."""
    if kwargs.get("copy"):
        return False
    probe = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    moved = func(probe, *args, **kwargs)
    return isinstance(moved, Tensor) and (moved.dtype, moved.device) == (tensor.dtype, tensor.device)


def _metadata() -> frozenset[Any]:
    readable = (
        "shape dtype device layout ndim requires_grad grad grad_fn is_leaf output_nr is_cuda is_cpu is_sparse "
        "is_sparse_csr is_quantized is_meta is_nested is_mkldnn is_mps is_xpu is_xla is_hpu is_ipu is_mtia is_vulkan "
        "is_maia names nbytes itemsize retains_grad _backward_hooks _post_accumulate_grad_hooks _version _base name"
    )
    callable_ = (
        "size numel nelement dim ndimension stride storage_offset element_size is_floating_point is_complex "
        "is_contiguous is_inference is_pinned is_shared is_signed get_device requires_grad_ register_hook "
        "register_post_accumulate_grad_hook has_names __hash__ __len__ __format__"
    )
    functions = (
        "_has_compatible_shallow_copy_type zeros_like ones_like empty_like full_like rand_like randn_like "
        "is_floating_point is_complex numel is_tensor"
    )
    found: set[Any] = set()
    for name in readable.split():
        attribute = getattr(Tensor, name, None)
        if attribute is not None:
            found.add(attribute.__get__)
    for name in ("requires_grad", "grad", "_backward_hooks", "_post_accumulate_grad_hooks"):
        attribute = getattr(Tensor, name, None)
        if attribute is not None:
            found.add(attribute.__set__)
            found.add(getattr(attribute, "__delete__", attribute.__set__))
    found.update(getattr(Tensor, name) for name in callable_.split() if hasattr(Tensor, name))
    found.update(
        getattr(Tensor, name) for name in ("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor")
    )
    found.update(getattr(torch, name) for name in functions.split() if hasattr(torch, name))
    return frozenset(found)


METADATA = _metadata()
"""Operations that read no values."""
ALIASES = frozenset({Tensor.detach, torch.detach, Tensor.data.__get__})  # type: ignore[attr-defined]
MOVING = ("to", "cpu", "cuda", "float", "double", "half", "bfloat16", "type")
MOVES = frozenset(getattr(Tensor, name) for name in (*MOVING, "contiguous"))
SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]
