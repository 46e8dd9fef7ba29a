"""Memory and disk that a parameter takes are those of the table in the guide to offload."""

from __future__ import annotations

import tempfile

import pytest
import torch
import torch.distributed as dist
from harness import run_on_ranks

import deepspeed

NUMEL = 4 * (256 * 256 + 256)


def report_after_backward(stage, states, weights, gas, folder):
    """Return (memory for weights and states, memory for gradients, disk) in bytes a parameter."""
    zero = {
        "stage": stage,
        "stage3_param_persistence_threshold": 0,
        "offload_optimizer": {"device": states, "nvme_path": folder},
    }
    if stage == 3:
        zero["offload_param"] = {"device": weights, "nvme_path": folder, "max_in_cpu": 0}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": gas,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW"},
        "zero_optimization": zero,
    }
    model = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(4)))
    engine, *_ = deepspeed.initialize(model=model, config=config)
    for _ in range(2 * gas):
        engine.backward(engine(torch.ones(1, 256)).float().sum())
        report = engine.memory_report()
        engine.step()
    engine.destroy()
    return tuple(
        figure / NUMEL for figure in (report.parameters + report.masters + report.optimizer, report.gradients)
    ), report.on_disk / NUMEL


def rows(stage, gas, folder):
    share = 1 if stage == 0 else 1 / dist.get_world_size()
    weights = 2 * share if stage == 3 else 2
    gradient = (4 if gas > 1 and stage > 0 else 2) * share  # at stage 1 because these ranks share memory
    expected = {
        ("none", "none"): ((weights + 12 * share, gradient), 0),
        ("nvme", "none"): ((weights, 0), 12 * share),
    }
    if stage == 3:
        expected["none", "nvme"] = ((12 * share, gradient), 2 * share)
        expected["nvme", "nvme"] = ((0, 0), 14 * share)
    for places, (in_memory, on_disk) in expected.items():
        found_in_memory, found_on_disk = report_after_backward(stage, *places, gas, folder)
        assert found_in_memory == pytest.approx(in_memory, abs=0.01), places
        assert found_on_disk == pytest.approx(on_disk, rel=0.04), places  # parts begin at multiples of 4096


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("gas", [1, 2])
def test_bytes_of_a_parameter(stage, gas):
    with tempfile.TemporaryDirectory() as folder:
        run_on_ranks(2, rows, stage, gas, folder)
