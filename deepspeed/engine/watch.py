"""The hook that tells an engine of its module's outputs."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from deepspeed.common.untraced import Hook

if TYPE_CHECKING:
    from deepspeed.engine.engine import DeepSpeedEngine


class OutputWatch(Hook):
    """Forward hook on the root module that calls the engine, and is left behind by copies of the module.

    A module is copied (EMA, a reference model) and pickled with its hooks; the copy has no engine.
    """

    def __init__(self, engine: DeepSpeedEngine | None) -> None:
        self._engine = None if engine is None else weakref.ref(engine)

    def engine(self) -> DeepSpeedEngine | None:
        """Return the engine, or None where it is gone or this is a copy."""
        return None if self._engine is None else self._engine()

    def __call__(self, *args: Any) -> None:
        module = args[0]
        if module._compiled_call_impl is not None and torch.compiler.is_compiling():
            return  # the engine itself watches what a module returns that is compiled with its hooks
        super().__call__(*args)

    def run(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        """Have the engine watch what its module returned."""
        engine = self.engine()
        if engine is not None:
            engine.watch_outputs(output)

    def __reduce__(self) -> tuple[type[OutputWatch], tuple[None]]:
        return OutputWatch, (None,)
