"""A parameter as somebody's autograd function gets it back: whole, and still one that knows how it is sharded.

Autograd hands out what hooks on saved tensors return as a new tensor of class ``Tensor``, unless its class
dispatches by itself. Functions that gather what they need in backward (TRL's chunked loss) ask
``weight.ds_status`` of it, so what they get is of such a class, for which every operation is the plain one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.utils._pytree import tree_map_only

from deepspeed.zero.released import ShardedParameter
from deepspeed.zero.slot import Slot


class UnpackedParameter(ShardedParameter, Tensor):  # type: ignore[misc]
    """A view of a whole parameter's values; what is computed from it is of class ``Tensor``."""

    plain: Tensor

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        plain_args, plain_kwargs = tree_map_only(cls, lambda one: one.plain, (args, kwargs or {}))
        result = func(*plain_args, **plain_kwargs)
        if func is torch.ops.aten.detach.default:  # by which autograd makes the tensor that it hands out
            return _unpacked(result, args[0].ds_slot)
        return result


def as_asked_for(view: Tensor, slot: Slot | None) -> Tensor:
    """Return what the backward function that runs now gets for `view`.

    Args:
        view: the values, a view of the flat.
        slot: of the parameter that was saved; None if what was saved is only a view of one.
    """
    node = torch._C._current_autograd_node()
    if slot is None or not isinstance(node, BackwardCFunction):
        return view
    function: Any = getattr(node, "_forward_cls", None)
    if getattr(function, "__module__", "torch").partition(".")[0] == "torch":  # compiled code, checkpoints
        return view
    return _unpacked(view, slot)


def _unpacked(view: Tensor, slot: Slot) -> UnpackedParameter:
    made = Tensor._make_subclass(UnpackedParameter, view)
    made.plain, made.ds_slot = view, slot
    return made
