"""What a rank is doing when it meets the others, in words that can be compared and read.

Note [Same call, same words]
    All ranks of a group make the same calls in the same order. Each call has words: the operation, its size,
    and what is moved ("reduce_scatter_single of 512 x float32: gradients of layers.3"). Between ranks of one
    host the words travel with the signal that is sent anyway (note [Rooms and signals]) and are compared
    when they arrive; among hosts they choose the tag of the messages, so that what does not match does
    not meet. Different words for the same call are an error on every rank that hears of it. A rank that
    is late, however late, is not: see note [Standstill] for what is provable about ranks that wait.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch

from deepspeed.errors import CommunicationError

LONGEST = 400  # bytes of a call's words
PACKAGE = os.path.dirname(os.path.dirname(__file__)) + os.sep
LIBRARIES = (PACKAGE, os.path.dirname(torch.__file__) + os.sep)
LAUNCHER = os.path.join(PACKAGE, "launcher") + os.sep
LOST = ("onnection", "imed out", "ocket", "peer")  # how torch says that a peer is gone or did not come


@functools.lru_cache(maxsize=4096)
def words(op: str, numel: int = 0, dtype: torch.dtype | None = None, label: str = "") -> bytes:
    """Describe a call: equal on all ranks that make the same one."""
    size = "" if dtype is None else f" of {numel} x {str(dtype).removeprefix('torch.')}"
    return f"{op}{size}{': ' if label else ''}{label}".encode()[:LONGEST]


def readable(said: bytes) -> str:
    """Return a call's words as text."""
    return said.decode(errors="replace")


def place(frame: FrameType | None = None) -> str:
    """Say what the user called and where: ``step at train.py:31``; empty where no user's code is running.

    Args:
        frame: the innermost one to look at; None: the caller's.
    """
    found = frame or sys._getframe(1)
    stack: list[FrameType] = []
    step: FrameType | None = found
    while step is not None and not step.f_code.co_filename.startswith(LAUNCHER):
        stack.append(step)
        step = step.f_back
    stack.reverse()
    entry = next((at for at, one in enumerate(stack) if one.f_code.co_filename.startswith(LIBRARIES)), 0)
    if entry == 0:
        return ""
    inside = [one for one in stack[entry:] if one.f_code.co_filename.startswith(PACKAGE)]
    called = next((one for one in inside if not one.f_code.co_name.startswith("_")), stack[entry])
    if called.f_code.co_name == "wrapper":  # torch's own, around each collective
        called = stack[stack.index(called) + 1]
    theirs = [one for one in stack if not one.f_code.co_filename.startswith(("<", *LIBRARIES))]
    text = f"{called.f_code.co_name} at {_line(stack[entry - 1])}"
    return text if not theirs or theirs[-1] is stack[entry - 1] else f"{text}, in {_line(theirs[-1])}"


def _line(frame: FrameType) -> str:
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"


def here() -> str:
    """Say in brackets where this rank is."""
    where = place(sys._getframe(1))
    return f" ({where})" if where else ""


def disagreement(call: int, sayings: dict[int, str]) -> CommunicationError:
    """Return the error for ranks (global) that make different calls where one is due."""
    said = ", ".join(f"rank {rank} is in {what}" for rank, what in sorted(sayings.items()))
    return CommunicationError(
        f"ranks disagree about call {call} of their group: {said}; "
        "every rank must make the same calls in the same order"
    )


def guarded(what: bytes, start: Callable[[], Any], on_loss: Callable[[], object] | None = None) -> Any:
    """Run a call of torch's; where a peer is lost in it, say in which call this rank was.

    Args:
        what: the call's words.
        start: makes it.
        on_loss: asked first; may know better and raise.
    """
    try:
        return start()
    except RuntimeError as error:
        if isinstance(error, CommunicationError) or not any(word in str(error) for word in LOST):
            raise
        if on_loss is not None:
            on_loss()
        raise CommunicationError(
            f"another rank ended or did not come while this one was in {readable(what)}{here()}: "
            f"{str(error).splitlines()[0]}"
        ) from error
