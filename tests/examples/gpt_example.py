"""Shared by the tests of the example: its folder on the path, a small text, a way to run it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
SCRIPT = EXAMPLES / "pretrain_gpt.py"
TINY = ["--layers", "1", "--dim", "32", "--heads", "2", "--seq", "32", "--sample-bytes", "16", "--lr", "0.02"]

if str(EXAMPLES) not in sys.path:
    sys.path.insert(0, str(EXAMPLES))


def write_text(folder: Path, files: int = 4) -> Path:
    """Write a few files of text that is easy to learn; return their folder."""
    text = folder / "text"
    text.mkdir()
    for number in range(files):
        (text / f"{number}.txt").write_text(f"{number}: the cat sat on the mat, then the dog sat too.\n" * 60)
    return text


def run_script(*arguments: object, folder: Path, script: Path = SCRIPT, expect: int = 0) -> str:
    """Run a script on one rank in `folder`; see `run`."""
    return run([sys.executable, str(script), *map(str, arguments)], folder=folder, expect=expect)


def run(command: list[str], *, folder: Path, expect: int = 0) -> str:
    """Run a command; return its standard output, or its errors where `expect` is not 0."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == expect, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stderr if expect else done.stdout
