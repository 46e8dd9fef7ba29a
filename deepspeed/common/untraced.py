"""Code that torch.compile leaves as it is.

Note [Compiled from outside]
``torch.compile(engine)``, or of its module or blocks, before or after ``deepspeed.initialize``, traces whatever runs
inside. The engine's own Python, and hooks that gather or watch, cannot be part of a graph: what is untraced ends it.
What lies between is compiled: the whole module at stages 0 to 2, each block at stage 3. Nobody traces in a program
that has not imported ``torch._dynamo`` (a second and 72 MiB), so it is not imported here either.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch


def untraced() -> Callable[..., Any]:
    """Return what calls a function with arguments: ``untraced()(function, argument)``.

    Two steps, because torch compiles each Python frame that it meets: a frame of ours that passed on any
    arguments would be compiled anew for each kind of them.
    """
    return _call_outside_of_graphs if may_be_traced() else _call


def may_be_traced() -> bool:
    """Whether torch may trace what this process runs; see note [Compiled from outside]."""
    return torch.compiler.is_compiling() or "torch._dynamo" in sys.modules


def _call(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


_call_outside_of_graphs: Callable[..., Any] = torch._disable_dynamo(_call)  # type: ignore[attr-defined]


@functools.cache
def untraced_class(cls: type[Any]) -> type[Any]:
    """Return a subclass of a class of `Hook`, no call of which is traced."""
    return type(cls.__name__, (cls,), {"__call__": torch.compiler.disable(cls.__call__)})


class Hook:
    """Base of hooks on modules that are no part of a graph."""

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling():
            return _call_outside_of_graphs(self._run_traced, *args)
        return self.run(*args)

    def _run_traced(self, *args: Any) -> Any:
        self.leave_graphs()
        return self.run(*args)

    def run(self, *args: Any) -> Any:
        """Do what the hook is for; arguments are those that torch gives it."""
        raise NotImplementedError

    def leave_graphs(self) -> None:
        """Torch traces the hook: see that it does not do so again."""
        self.__class__ = untraced_class(type(self))  # type: ignore[arg-type]
