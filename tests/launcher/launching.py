"""Running tiny scripts under the launcher, or under one rank of it without torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

from deepspeed.launcher.rank import Task

ROOT = Path(__file__).parents[2]
NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE")
SHOWN = (*NAMES, "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS", "PYTHONPATH", "MINE", "FROM_FILE")
CLEARED = ("OMP_NUM_THREADS", "PYTHONUNBUFFERED")
REPORT = f"""
import json, os, sys
print(json.dumps([sys.argv[1:], {{name: os.environ.get(name) for name in {SHOWN}}}, os.getcwd()]))
"""


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in CLEARED}
    path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH")) if part)
    return {**kept, "PYTHONPATH": path, **(extra or {})}


def deepspeed(
    *arguments: object, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "deepspeed.launcher.runner", *map(str, arguments)],
        env=environment(env),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
    )


def start_deepspeed(*arguments: object, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """Start the command and go on."""
    return subprocess.Popen(
        [sys.executable, "-m", "deepspeed.launcher.runner", *map(str, arguments)],
        env=environment(env),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_rank(folder: Path, target: object, *arguments: str, **task: object) -> subprocess.Popen[str]:
    """Start one rank as torch's agent does, in a session of its own; its record goes to `folder`."""
    place = {"RANK": "3", "LOCAL_RANK": "1", "TORCHELASTIC_ERROR_FILE": str(folder / "error.json")}
    encoded = Task(**{"launcher": os.getpid(), **task}).encode()
    return subprocess.Popen(
        [sys.executable, "-m", "deepspeed.launcher.rank", encoded, str(target), *arguments],
        env=environment(place),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def record_in(folder: Path) -> dict:
    return json.loads((folder / "error.json").read_text())["deepspeed"]


def reports(output: str) -> list[tuple[list[str], dict[str, str], str]]:
    """What `REPORT` printed on each rank: arguments, environment, folder."""
    return [json.loads(line) for line in output.splitlines() if line.startswith("[[")]


def wait_until(happened: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def read_pids(*paths: Path) -> list[int]:
    """Wait until every file holds a process id, and return them."""
    wait_until(lambda: all(path.exists() and path.read_text().endswith("\n") for path in paths))
    return [int(path.read_text()) for path in paths]


def gone(pids: list[int]) -> bool:
    """Whether none of the processes runs any more (one that nobody has collected does not run)."""
    for pid in pids:
        try:
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                return False
        except psutil.NoSuchProcess:
            continue
    return True
