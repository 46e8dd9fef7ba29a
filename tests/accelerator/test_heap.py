"""What is freed in one step is there for the next, unless the user has said otherwise."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from deepspeed.accelerator.heap import keep_freed_memory, trim_heap
keep_freed_memory()

def step():
    for size in (2**21, 2**23, 2**22):  # up to 32 MiB, which glibc would take from the system each time
        torch.ones(size)

def resident():
    import psutil
    return psutil.Process().memory_info().rss

for _ in range(20):  # until there is a free block for each, whatever small ones lie between them
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
kept = resident()
trim_heap()
print(kept - resident())
"""

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")


def run_steps(**settings: str) -> tuple[int, int]:
    """Return the page faults of five steps, and the bytes that a trim gave back."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], env={**kept, **settings}, capture_output=True, text=True, check=True
    )
    faults, given_back = map(int, done.stdout.split())
    return faults, given_back


@glibc
def test_freed_memory_is_used_again_without_page_faults() -> None:
    faults, given_back = run_steps()
    assert faults < 1000
    assert given_back > 25 * 2**20


@glibc
@pytest.mark.parametrize(
    "setting",
    [{"MALLOC_TRIM_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"}],
)
def test_settings_of_the_user_win(setting: dict[str, str]) -> None:
    faults, _ = run_steps(**setting)
    assert faults > 10_000


DESTROYED = """
import psutil, torch, deepspeed

def resident():
    return psutil.Process().memory_info().rss

model = torch.nn.Sequential(*[torch.nn.Linear(512, 512) for _ in range(4)])
config = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "AdamW"}}
engine, *_ = deepspeed.initialize(model=model, config=config)
for _ in range(2):
    engine.backward(engine(torch.ones(8192, 512)).sum())  # 16 MiB for each activation
    engine.step()
kept = resident()
engine.destroy()
print(kept - resident())
"""


@glibc
def test_a_destroyed_engine_gives_back_what_its_steps_used() -> None:
    done = subprocess.run([sys.executable, "-c", DESTROYED], capture_output=True, text=True, check=True)
    assert int(done.stdout.splitlines()[-1]) > 40 * 2**20
