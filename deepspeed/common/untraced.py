"""Code that torch.compile leaves as it is.

Note [Compiled from outside]
``torch.compile(engine)``, and a model that was compiled before ``deepspeed.initialize``, trace whatever runs inside
them. The engine's own Python, and hooks that gather, cannot be part of a graph: what is untraced ends it. What lies
between is compiled: the whole module at stages 0 to 2, each block at stage 3. Nobody traces in a program that has
not imported ``torch._dynamo`` (a second and 72 MiB), so it is not imported here either.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

Hook = TypeVar("Hook", bound=type)


def untraced() -> Callable[..., Any]:
    """Return what calls a function with arguments: ``untraced()(function, argument)``.

    Two steps, because torch compiles each Python frame that it meets: a frame of ours that passed on any
    arguments would be compiled anew for each kind of them.
    """
    return _call_outside_of_graphs if torch.compiler.is_compiling() or _may_trace() else _call


@functools.cache
def untraced_class(cls: Hook) -> Hook:
    """Return a subclass of a class of hooks, whose calls are not traced."""
    return type(cls.__name__, (cls,), {"__call__": torch.compiler.disable(cls.__call__)})  # type: ignore[return-value]


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile was used on a module, or on one inside it."""
    if not _may_trace():
        return False
    wrapper = sys.modules["torch._dynamo"].OptimizedModule
    return any(isinstance(part, wrapper) or part._compiled_call_impl is not None for part in module.modules())


def _may_trace() -> bool:
    return "torch._dynamo" in sys.modules


def _call(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


_call_outside_of_graphs: Callable[..., Any] = torch._disable_dynamo(_call)  # type: ignore[attr-defined]
