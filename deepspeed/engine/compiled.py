"""A module's forward that is compiled by itself, without the hooks around it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class CompiledForward:
    """What stands for ``module.forward``; copies of the module have the plain one again.

    ``module.compile()`` would take the module's hooks into the graph, and those at stage 3 end it.

    Args:
        module: whose forward is compiled, when it is first called.
        args: of ``torch.compile``, as are `options`.
    """

    def __init__(self, module: nn.Module, *args: Any, **options: Any) -> None:
        functools.update_wrapper(self, module.forward)
        self._plain = module.forward
        self._compiled = torch.compile(module.forward, *args, **options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._compiled(*args, **kwargs)

    def __reduce__(self) -> Any:
        return _same, (self._plain,)


def _same(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return what a copy of a `CompiledForward` is: the copied module's bound method."""
    return forward
