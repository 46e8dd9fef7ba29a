"""The compiled form of the Adam pass, where a compiler is present.

Inductor guards its caches with locks that the kernel releases when a process dies, and moves finished files
into place: a run that is killed while it compiles leaves nothing that could stop the next.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from deepspeed.common.logging import announce
from deepspeed.ops.adam.kernel import AdamHyper, AdamTensors, Control, adam_pass, numbers
from deepspeed.ops.pieces import CHUNK

SWITCH = "DEEPSPEED_COMPILE_OPTIMIZER"
"""Environment variable; ``0`` never compiles unless an optimizer asks for it."""

WORTHWHILE = 64_000_000
"""Elements an optimizer updates on a rank from which on compiling pays: it takes some seconds and 100 MB for
the compiler, and saves a fifth of a nanosecond per element and step over the chunked update."""


def path_in_use(device: str = "cpu") -> tuple[str, str]:
    """Return which form of the Adam pass large models use on `device` ("compiled" or "chunked"), and why."""
    if os.environ.get(SWITCH, "1") == "0":
        return "chunked", f"{SWITCH}=0"
    missing = _missing_on_host() if device == "cpu" else _missing_on_accelerator()
    if missing is not None:
        return "chunked", missing
    return "compiled", f"C++ compiler {_cpp_compiler()}" if device == "cpu" else "Triton"


def _cpp_compiler() -> str:
    """The name that inductor would call."""
    return os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")


def _missing_on_host() -> str | None:
    if sys.platform == "win32":
        return "compiling on Windows is not supported"
    if shutil.which(_cpp_compiler()) is None:
        return f"no C++ compiler: {_cpp_compiler()} is not in PATH"
    if not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")):
        return "no Python.h: the development files of Python are not installed"
    return None


def _missing_on_accelerator() -> str | None:
    return None if importlib.util.find_spec("triton") else "Triton is not installed"


class CompiledPass:
    """`adam_pass`, compiled at its first use and given up for good if that fails.

    Args:
        wanted: True compiles whatever the size, False never, None where it can and pays.
    """

    def __init__(self, wanted: bool | None = None) -> None:
        self._wanted = wanted
        self._run: Callable[..., None] | None = None
        self._decided = wanted is False
        self._proven = False

    def __reduce__(self) -> tuple[type[CompiledPass], tuple[bool | None]]:
        """A copy compiles for itself."""
        return CompiledPass, (self._wanted,)

    def decide(self, device: str, numel: Callable[[], int]) -> None:
        """Choose once whether to compile, for an optimizer of ``numel()`` elements on this rank."""
        if self._decided:
            return
        self._decided = True
        if self._wanted or (numel() >= WORTHWHILE and path_in_use(device)[0] == "compiled"):
            self._run = torch.compile(adam_pass, dynamic=True, fullgraph=True, options={"compile_threads": 1})

    def update(self, tensors: AdamTensors, hyper: AdamHyper, control: Control) -> bool:
        """Update, and return True; or return False where these tensors are better updated without."""
        master = tensors.master
        if self._run is None or type(master) is not Tensor or master.dtype is torch.float64:
            return False
        if master.numel() < CHUNK and not self._wanted:
            return False
        arguments = (master, tensors.exp_avg, tensors.exp_avg_sq, tensors.grad, tensors.out)
        try:
            with nullcontext() if self._proven else _quiet():
                self._run(*arguments, numbers(hyper, control), hyper.decoupled)
        except Exception as error:  # a compiler that is there and does not work fails in many ways
            self._run = None
            announce(
                f"Adam: compiling failed ({_reason(error)}); the chunked update is used instead; "
                f"{SWITCH}=0 skips the attempt"
            )
            return False
        self._proven = True
        return True


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the compiler's own deprecation warnings from the user, who may have turned warnings into errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _reason(error: Exception) -> str:
    inner = getattr(error, "inner_exception", error)
    lines = str(inner).strip().splitlines() or [""]
    return f"{type(inner).__name__}: {lines[0][:200]}"
