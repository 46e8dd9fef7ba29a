"""The hook that tells an engine of its module's outputs."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from deepspeed.engine.engine import DeepSpeedEngine


class OutputWatch:
    """Forward hook on the root module that calls the engine, and is left behind by copies of the module.

    A module is copied (EMA, a reference model) and pickled with its hooks; the copy has no engine.
    """

    def __init__(self, engine: DeepSpeedEngine | None) -> None:
        self._engine = None if engine is None else weakref.ref(engine)

    def engine(self) -> DeepSpeedEngine | None:
        """Return the engine, or None where it is gone or this is a copy."""
        return None if self._engine is None else self._engine()

    def __call__(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        if torch.compiler.is_compiling():  # the engine watches what a compiled module returns itself
            return
        engine = self.engine()
        if engine is not None:
            engine.watch_outputs(output)

    def __reduce__(self) -> tuple[type[OutputWatch], tuple[None]]:
        return OutputWatch, (None,)
