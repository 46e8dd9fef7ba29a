"""Open torch files of any origin without running code from them.

Objects of the original's own classes come as `Inert`: what they were made with, and nothing that acts.
"""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from deepspeed.errors import CheckpointError


class Inert:
    """An object of a class that is not there: its arguments and its state.

    Attributes:
        args: what the class was called with.
        state: what it held.
    """

    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> Inert:
        made = super().__new__(cls)
        made.args, made.state = args, {}
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state


def load_safely(path: Path, inert: Iterable[str] = (), *, users: bool = False) -> Any:
    """Return what a torch file holds; the values of tensors are read when they are used.

    Args:
        path: of the file.
        inert: full names of classes whose objects come as `Inert`.
        users: numpy values and ``argparse.Namespace`` may be in it.

    Raises:
        CheckpointError: the file is missing, cut, damaged, or holds something else.
    """
    allowed: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [(Inert, name) for name in inert]
    if users:
        allowed += _users()
    with safe_globals(allowed):
        try:
            return torch.load(path, weights_only=True, mmap=True, map_location="cpu")
        except FileNotFoundError:
            raise CheckpointError(f"{path}: missing") from None
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror or error}") from None
        except pickle.UnpicklingError as error:
            raise CheckpointError(f"{path}: {_refusal(path, error)}") from None
        except Exception as error:  # whatever bytes may bring about that are no torch file
            reason = str(error).partition("\n")[0]
            raise CheckpointError(f"{path}: cut or damaged: it is no whole torch file ({reason})") from None


def _refusal(path: Path, error: Exception) -> str:
    """Say what a file holds that is refused."""
    names: list[str] = []
    with suppress(Exception):  # the same bytes once more
        names = get_unsafe_globals_in_checkpoint(path)
    if names:
        return (
            f"holds objects of {', '.join(sorted(names))}, and loading runs no code from a checkpoint; save it again "
            "without them"
        )
    return f"damaged, or not only tensors and plain data ({str(error).partition(chr(10))[0]})"


def _users() -> list[tuple[Callable[..., Any], str]]:
    """Return what rebuilds the further values that a user's state may have, by the names that files know it by."""
    pieces: list[Any] = [np.zeros(1).__reduce__()[0], np.float64(0).__reduce__()[0]]
    made: list[tuple[Callable[..., Any], str]] = [(argparse.Namespace, "argparse.Namespace")]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        made += [(piece, f"{module}.{piece.__name__}") for piece in pieces]
    made += [(np.ndarray, "numpy.ndarray"), (np.dtype, "numpy.dtype")]
    kinds = {type(np.dtype(code)) for code in np.typecodes["All"] if code not in "OMmV"}
    return made + [(kind, f"numpy.dtypes.{kind.__name__}") for kind in kinds]
