"""The compiled Adam: the same numbers, one graph, no trace left by a killed compilation."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch._dynamo.utils import counters

from deepspeed.ops.adam import FusedAdam, path_in_use
from deepspeed.ops.adam import compiled as compiled_module

needs_compiler = pytest.mark.skipif(path_in_use()[0] != "compiled", reason=path_in_use()[1])


def update_all(compile, lengths):
    """Update leaves that are slices of one flat, twice, with another rate the second time."""
    torch.manual_seed(0)
    flat, grad = torch.randn(sum(lengths)), torch.randn(sum(lengths)).bfloat16()
    out = torch.zeros(sum(lengths), dtype=torch.bfloat16)
    leaves = list(flat.split(lengths))
    optimizer = FusedAdam(leaves, lr=0.1, weight_decay=0.1, compile=compile)
    group = optimizer.param_groups[0]
    for number, found_inf in enumerate((0.0, 1.0, 0.0)):
        group["lr"] = 0.1 / (number + 1)
        parts = zip(leaves, grad.split(lengths), out.split(lengths), strict=True)
        for leaf, part, low in parts:
            flags = {"scale": torch.tensor(0.5), "found_inf": torch.tensor(found_inf)}
            optimizer.update_leaf(leaf, group, part, out=low, **flags)
    return flat, out, [optimizer.state[leaf]["exp_avg_sq"] for leaf in leaves]


@needs_compiler
def test_one_graph_serves_every_length_and_rate():
    lengths = [300, 777, 4099, 64, 5000]
    torch._dynamo.reset()
    before = counters["stats"]["unique_graphs"]
    compiled = update_all(True, lengths)
    assert counters["stats"]["unique_graphs"] == before + 1
    plain = update_all(False, lengths)
    torch.testing.assert_close(compiled[0], plain[0], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(compiled[2], plain[2], rtol=2e-6, atol=1e-7)
    assert torch.equal(compiled[1], compiled[0].bfloat16())


def test_a_compiler_that_fails_is_reported_once_and_replaced(monkeypatch):
    said = []

    def broken(*args, **kwargs):
        def run(*tensors):
            raise OSError("cc1plus: no space left")

        return run

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(compiled_module, "announce", said.append)
    tried = update_all(True, [300, 20])
    assert len(said) == 1
    assert "no space left" in said[0]
    assert torch.equal(tried[0], update_all(False, [300, 20])[0])


def test_small_optimizers_are_not_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", None)
    update_all(None, [300, 20])


def test_an_optimizer_that_must_not_compile_does_not_after_loading_or_copying_either(monkeypatch):
    monkeypatch.setattr(torch, "compile", None)
    monkeypatch.setattr(compiled_module, "WORTHWHILE", 1)
    optimizer = copy.deepcopy(FusedAdam([torch.ones(300)], compile=False))
    optimizer.load_state_dict(optimizer.state_dict())
    (leaf,) = optimizer.param_groups[0]["params"]
    optimizer.update_leaf(leaf, optimizer.param_groups[0], torch.ones(300))


def test_the_report_says_which_path_and_why(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    path, reason = path_in_use()
    assert path == "chunked"
    assert "compiler" in reason
    monkeypatch.setenv(compiled_module.SWITCH, "0")
    assert path_in_use() == ("chunked", f"{compiled_module.SWITCH}=0")


SCRIPT = """
import torch
from deepspeed.ops.adam import FusedAdam
leaf = torch.ones(300)
optimizer = FusedAdam([leaf], compile=True)
optimizer.update_leaf(leaf, optimizer.param_groups[0], torch.ones(300))
assert optimizer._compiled._run is not None
"""


@needs_compiler
@pytest.mark.timeout(280)
def test_a_killed_compilation_does_not_stop_the_next(tmp_path):
    """The first process dies while it holds a lock; the second must neither wait for it nor fail."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT]
    with subprocess.Popen(command, env=environment) as first:
        deadline = time.monotonic() + 120
        while not list(tmp_path.rglob("*.lock")) and first.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        first.send_signal(signal.SIGKILL)
    assert first.returncode == -signal.SIGKILL
    subprocess.run(command, env=environment, check=True, timeout=150)
