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
"""


def test_an_offline_run_is_on_disk(tmp_path):
    pytest.importorskip("wandb")
    environ = os.environ | {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}
    subprocess.run([sys.executable, "-c", SCRIPT], env=environ, cwd=tmp_path, check=True, timeout=200)
    logs = list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len(logs) == 1
    written = logs[0].read_bytes()
    for text in (b"loss", b"1.5", b"1.25", b"lr", b"0.1"):
        assert text in written
