"""Weights & Biases itself, without a network: the run lands on disk."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
from deepspeed.monitor import WandbMonitor
monitor = WandbMonitor(project="p", group="g")
monitor.write([("loss", 1.5, 1), ("lr", 0.1, 1), ("loss", 1.25, 2)])
monitor.close()
summary = dict(monitor.run.summary)
assert summary["loss"] == 1.25 and summary["lr"] == 0.1, summary
"""


def test_an_offline_run_is_on_disk(tmp_path):
    pytest.importorskip("wandb")
    environ = os.environ | {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}
    subprocess.run([sys.executable, "-c", SCRIPT], env=environ, cwd=tmp_path, check=True, timeout=200)
    runs = [name for name in os.listdir(tmp_path / "wandb") if name.startswith("offline-run-")]
    assert len(runs) == 1
    assert any(name.endswith(".wandb") for name in os.listdir(tmp_path / "wandb" / runs[0]))
