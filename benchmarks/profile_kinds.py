"""What the operators of a step are for, by their names: the lines of a profile."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

MATMUL, ATTENTION, OTHER = "matrix multiplications", "attention", "other kernels of the model"
LOSS, COPIES, SUMS = "softmax and loss", "copies and casts", "sums and scaling"
NORM, UPDATE, MAKING = "gradient norm", "update", "making and clearing tensors"
COMM, REST = "communication operators", "other operators"
WAITING, PYTHON = "waiting, for peers or for a core", "Python, hooks and autograd"
LINES = (
    MATMUL, ATTENTION, LOSS, OTHER, COPIES, SUMS, NORM, UPDATE, MAKING, COMM, REST, WAITING, PYTHON,
)  # fmt: skip

# The first whose word is within the name; those of communication first, for they bear names of sums and gathers too.
_WORDS = (
    (
        COMM,
        (
            "c10d::",
            "gloo:",
            "nccl:",
            "_c10d_functional",
            "record_param_comms",
            "fsdp::",
            "DistributedDataParallel",
        ),
    ),
    (UPDATE, ("adam", "Optimizer.step", "Torch-Compiled", "CompiledFxGraph")),
    (NORM, ("_foreach_norm", "vector_norm", "aten::norm")),
    (ATTENTION, ("attention",)),
    (LOSS, ("softmax", "nll_loss", "cross_entropy")),
    (OTHER, ("layer_norm", "gelu", "embedding")),
    (MATMUL, ("mm", "matmul", "linear", "bmm")),
    (
        COPIES,
        ("copy", "clone", "contiguous", "aten::to", "aten::cat", "chunk_cat", "aten::stack", "split_with"),
    ),
    (MAKING, ("empty", "zero", "fill", "ones", "resize", "new_", "aten::full", "arange")),
    (SUMS, ("add", "sum", "mul", "div", "sub", "lerp", "sqrt", "addc")),
)


def kind(name: str, phase: str) -> str:
    """Return the line of an operator; arithmetic of the update is part of it."""
    # A node of autograd bears the name of what it differentiates (AddmmBackward0); hooks in Python run within it.
    if "autograd::" in name or "Backward" in name:
        return PYTHON
    found = next((line for line, words in _WORDS if _is_of(name, words)), REST)
    return UPDATE if found == SUMS and phase == "step" else found


def _is_of(name: str, words: tuple[str, ...]) -> bool:
    lowered = name.lower()
    return any(word.lower() in lowered for word in words)


def by_line(rank: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Sort a rank's profiled step into lines: line -> phase -> seconds.

    What is no operator is waiting as far as the thread was off its processor, else Python.
    """
    found: dict[str, dict[str, float]] = {line: defaultdict(float) for line in LINES}
    for phase, operators in rank["operators"].items():
        for name, seconds in operators.items():
            found[kind(name, phase)][phase] += seconds
        outside = found[PYTHON][phase] + rank["outside"][phase]
        waiting = max(0.0, min(outside, rank["off_processor"][phase]))
        found[WAITING][phase], found[PYTHON][phase] = waiting, outside - waiting
    return {line: dict(phases) for line, phases in found.items()}
