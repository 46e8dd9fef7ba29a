"""Weights & Biases itself, without a network: the run lands on disk."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import torch
import deepspeed
engine, *_ = deepspeed.initialize(
    model=torch.nn.Linear(1, 1),
    config={
        "train_batch_size": 1,
        "optimizer": {"type": "SGD", "params": {"lr": 0.125}},
        "wandb": {"enabled": True, "project": "p", "group": "g"},
    },
)
for _ in range(2):
    engine.backward(engine(torch.ones(1, 1)).mean())
    engine.step()
engine.destroy()
"""


def test_an_offline_run_is_on_disk(tmp_path):
    pytest.importorskip("wandb")
    environ = os.environ | {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}
    subprocess.run([sys.executable, "-c", SCRIPT], env=environ, cwd=tmp_path, check=True, timeout=200)
    logs = list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len(logs) == 1
    written = logs[0].read_bytes()
    for name in ("train_loss", "lr", "loss_scale", "grad_norm", "samples_per_sec", "memory_gib"):
        assert f"Train/Samples/{name}".encode() in written
    assert b"0.125" in written
