"""The compiled form of the Adam pass, where a compiler is present."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from collections.abc import Callable

import torch

from deepspeed.common.logging import announce
from deepspeed.ops.adam.kernel import adam_pass

SWITCH = "DEEPSPEED_COMPILE_OPTIMIZER"
"""Environment variable; ``0`` never compiles."""

WORTHWHILE = 8_000_000
"""Elements an optimizer updates on a rank, below which compiling takes longer than it will ever save."""


def path_in_use(device: str = "cpu") -> tuple[str, str]:
    """Return which form of the Adam pass large models use on `device` ("compiled" or "chunked"), and why."""
    if os.environ.get(SWITCH, "1") == "0":
        return "chunked", f"{SWITCH}=0"
    if device == "cpu":
        compiler = _cpp_compiler()
        if compiler is None:
            return "chunked", "no C++ compiler found"
        return "compiled", f"C++ compiler {compiler}"
    if importlib.util.find_spec("triton") is None:
        return "chunked", "Triton is not installed"
    return "compiled", "Triton"


@functools.cache
def compiled_pass(device: str) -> Callable[..., None] | None:
    """Return `adam_pass` compiled for leaves of any length, or None where it cannot be.

    Inductor guards its caches with locks that the kernel releases when a process dies, so a killed run
    leaves nothing that could stop the next.
    """
    if path_in_use(device)[0] != "compiled":
        return None
    return torch.compile(adam_pass, dynamic=True, fullgraph=True, options={"compile_threads": 1})


def give_up(error: Exception) -> None:
    """Tell once that compiling failed, and go on without."""
    announce(
        f"Adam: compiling failed ({type(error).__name__}), the chunked update is used; {SWITCH}=0 skips it"
    )
    os.environ[SWITCH] = "0"
    compiled_pass.cache_clear()


def _cpp_compiler() -> str | None:
    named = os.environ.get("CXX")
    for name in (named,) if named else ("g++", "clang++"):
        if shutil.which(name):
            return name
    return None
