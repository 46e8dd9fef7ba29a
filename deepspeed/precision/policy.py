"""Which number format is used where: storage, compute, reduction, accumulation, master.

The default is the safe one: whatever dtype parameters are stored and computed in, their master copy, the
moments and the accumulation of gradients over micro-batches are fp32.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

NAMES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "float": torch.float32,
    "fp16": torch.float16,
    "float16": torch.float16,
    "half": torch.float16,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
}
"""Names of number formats in configurations, with or without a ``torch.`` in front."""


def dtype_named(name: str) -> torch.dtype:
    """Return the dtype that a configuration calls `name` (see `NAMES`)."""
    return NAMES[name.lower().removeprefix("torch.")]


@dataclass(frozen=True)
class ParamDtypes:
    """Number formats of one parameter; `packed`: its values are bits of other numbers, never to be converted."""

    storage: torch.dtype
    reduce: torch.dtype
    accumulate: torch.dtype
    master: torch.dtype
    packed: bool = False


@dataclass(frozen=True)
class PrecisionPolicy:
    """Number formats of a model; None follows the parameter.

    Attributes:
        storage: dtype of parameters between and during uses; None keeps each as it is.
        autocast: dtype of ``torch.autocast`` around forward; None does not use it.
        reduce: dtype of gradients while they are reduced; None: the storage dtype.
        accumulate: dtype of gradients accumulated over micro-batches; None: fp32 or wider.
        master: dtype of the copy that is updated; None: fp32 or wider.
        lowered: ids of parameters whose gradients travel in the autocast dtype.
        loss_scaled: whether the loss must be scaled before backward (fp16).
        cast_inputs: whether floating-point inputs of forward are cast to `storage`.
    """

    storage: torch.dtype | None = None
    autocast: torch.dtype | None = None
    reduce: torch.dtype | None = None
    accumulate: torch.dtype | None = None
    master: torch.dtype | None = None
    lowered: frozenset[int] = frozenset()
    loss_scaled: bool = False
    cast_inputs: bool = False

    def of(self, param: nn.Parameter) -> ParamDtypes:
        """Return the number formats of `param`."""
        packed = hasattr(param, "quant_state")  # bitsandbytes packs 4-bit numbers into floats, if so told
        cast = param.is_floating_point() and not packed
        storage = self.storage if self.storage is not None and cast else param.dtype
        wide = torch.promote_types(storage, torch.float32)
        reduce = self.reduce or (self.autocast if id(param) in self.lowered else None) or storage
        return ParamDtypes(storage, reduce, self.accumulate or wide, self.master or wide, packed)

    def describe(self, params: Iterable[nn.Parameter]) -> list[dict[str, str]]:
        """Return one row per kind of parameter: how many elements, and the dtype of each use."""
        counts: dict[ParamDtypes, int] = {}
        for param in params:
            counts[self.of(param)] = counts.get(self.of(param), 0) + param.numel()
        return [
            {
                "elements": f"{numel:,}",
                "storage": _short(dtypes.storage),
                "compute": _short(self.autocast or dtypes.storage),
                "reduce": _short(dtypes.reduce),
                "accumulate": _short(dtypes.accumulate),
                "master": _short(dtypes.master),
            }
            for dtypes, numel in counts.items()
        ]


def lowered_parameters(module: nn.Module, class_names: Iterable[str] | None) -> frozenset[int]:
    """Return the ids of parameters of modules that compute in lower precision under autocast.

    Args:
        module: the model.
        class_names: fully qualified class names; None: Linear and the convolutions.
    """
    names = set(class_names or (f"torch.nn.{name}" for name in ("Linear", "Conv1d", "Conv2d", "Conv3d")))
    return frozenset(
        id(param)
        for part in module.modules()
        if names & _qualified_names(type(part))
        for param in part.parameters(recurse=False)
    )


def _qualified_names(cls: type) -> set[str]:
    names = {f"{cls.__module__}.{cls.__qualname__}"}
    if getattr(torch.nn, cls.__name__, None) is cls:
        names.add(f"torch.nn.{cls.__name__}")
    return names


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")
