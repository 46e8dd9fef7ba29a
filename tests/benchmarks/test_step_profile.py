"""A profile sorts a step's time into lines that add up."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

Load = Callable[[str], ModuleType]


def a_rank(copies: float, waits: float) -> dict[str, Any]:
    operators = {
        "forward": {"aten::addmm": 0.1},
        "backward": {"aten::copy_": copies, "torch::autograd::AccumulateGrad": 0.03, "MmBackward0": 0.01},
        "step": {"aten::mul_": 0.02},
    }
    return {
        "operators": operators,
        "calls": {phase: dict.fromkeys(each, 2.0) for phase, each in operators.items()},
        "outside": {"forward": 0.01, "backward": 0.0, "step": 0.05},
        "off_processor": {"forward": -1e-6, "backward": waits, "step": 0.2},
        "seconds": {"total": 0.3},
        "faults": 12.0,
        "faults_from_disk": 0.0,
        "switches": 3.0,
        "system": 0.002,
        "other_threads": 0.001,
        "memory": {"bare": 2**28, "tensors": 2**29, "shared": 0, "peak": 2**30},
        "versions": {"torch": "2"},
    }


@pytest.mark.parametrize(
    ("name", "phase", "line"),
    [
        ("aten::mm", "backward", "matrix multiplications"),
        ("mkldnn::_linear_pointwise", "forward", "matrix multiplications"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "backward", "attention"),
        ("aten::_log_softmax", "forward", "softmax and loss"),
        ("aten::native_layer_norm_backward", "backward", "other kernels of the model"),
        ("aten::_to_copy", "forward", "copies and casts"),
        ("aten::_foreach_add_", "backward", "sums and scaling"),
        ("aten::_foreach_add_", "step", "update"),
        ("aten::linalg_vector_norm", "step", "gradient norm"),
        ("aten::_fused_adamw_", "step", "update"),
        ("aten::zero_", "backward", "making and clearing tensors"),
        ("gloo:all_reduce", "backward", "communication operators"),
        ("c10d::_allgather_base_", "forward", "communication operators"),
        ("autograd::engine::evaluate_function: AddmmBackward0", "backward", "Python, hooks and autograd"),
        ("torch::autograd::AccumulateGrad", "backward", "Python, hooks and autograd"),
        ("aten::view", "forward", "other operators"),
    ],
)
def test_an_operator_belongs_to_a_line(load: Load, name: str, phase: str, line: str) -> None:
    assert load("profile_kinds").kind(name, phase) == line


def test_what_is_no_operator_is_waiting_or_python_and_nothing_is_lost(load: Load) -> None:
    kinds, rank = load("profile_kinds"), a_rank(copies=0.2, waits=0.02)

    lines = kinds.by_line(rank)

    # Hooks run within autograd's nodes; what waits is off the processor, and no more than there is.
    assert lines[kinds.WAITING] == pytest.approx({"forward": 0.0, "backward": 0.02, "step": 0.05})
    assert lines[kinds.PYTHON] == pytest.approx({"forward": 0.01, "backward": 0.02, "step": 0.0})
    assert lines[kinds.UPDATE] == {"step": 0.02}
    whole = sum(map(sum, (each.values() for each in rank["operators"].values())))
    assert sum(sum(phases.values()) for phases in lines.values()) == pytest.approx(whole + 0.06)


def test_the_page_explains_a_row_beside_one_rank_alone(load: Load) -> None:
    profile = load("profile_step")
    options = profile.parse(["ours:2", "--precision", "fp32"])
    found = {
        "ours:2": [a_rank(0.2, 0.02), a_rank(0.3, 0.02)],
        "alone": [a_rank(0.15, 0.0)],
        "compute": [a_rank(0.1, 0.0)],
    }
    head = load("results").header()

    page = profile.paragraphs(found, options, head, {"torch": "2"})
    copies = next(line for line in page[-6].splitlines() if line.startswith("| copies"))

    assert options.name == "profile_ours_2"
    assert options.rows == ("ours:2", "alone", "compute")
    assert [cell.strip() for cell in copies.split("|")[2:-1]] == [
        "0.0", "250.0", "0.0", "250.0", "200.0-300.0", "150.0", "100.0", "+100.0",
    ]  # fmt: skip
    assert "| page faults " in page[-5]
    assert [cell.strip() for cell in page[-4].splitlines()[-1].split("|")[1:-1]] == [
        "at the peak of a step", "1,024", "1,024", "1,024",
    ]  # fmt: skip
    assert page[-2].splitlines()[2].split("|")[1].strip() == "`aten::copy_`"
    assert "fp32" in page[1]
