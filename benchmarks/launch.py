"""Starts the ranks of a benchmark in the right interpreter and collects what they report."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ENVIRONMENTS = HERE / ".envs"
TORCH_PIN = "torch==2.13.0"
ORIGINAL_PIN = "deepspeed==0.19.8"


class RunFailed(RuntimeError):
    """A rank ended with an error or did not end."""


@dataclass(frozen=True)
class Interpreter:
    """A Python to measure, with the variables it needs."""

    python: Path
    variables: dict[str, str]

    @property
    def extensions(self) -> Path:
        """Keep operators compiled at first use beside the interpreter, shared with nothing else."""
        return self.python.parent.parent / "torch_extensions"


def this_project() -> Interpreter:
    """Use the running interpreter with the package of this checkout."""
    return Interpreter(Path(sys.executable), {"PYTHONPATH": str(HERE.parent), "DS_ACCELERATOR": "cpu"})


def original(python: Path | None) -> Interpreter:
    """Use `python`, or an environment made here on first use, with the original DeepSpeed."""
    return Interpreter(python or _make_original(), {"DS_ACCELERATOR": "cpu"})


def plain_torch() -> Interpreter:
    """Use the running interpreter without any DeepSpeed setting."""
    return Interpreter(Path(sys.executable), {})


def interpreter_of(kind: str, original_python: Path | None) -> Interpreter:
    """Choose the interpreter for a row's kind."""
    if kind == "original":
        return original(original_python)
    return this_project() if kind == "ours" else plain_torch()


def _make_original() -> Path:
    """Create the environment of the original; takes minutes, once."""
    home = ENVIRONMENTS / "original"
    python = home / "bin" / "python"
    finished = home / "finished"
    if finished.exists():
        return python
    print(f"making {home} for {ORIGINAL_PIN} (once; minutes)", file=sys.stderr, flush=True)
    ENVIRONMENTS.mkdir(parents=True, exist_ok=True)
    (ENVIRONMENTS / ".gitignore").write_text("*\n")
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
    subprocess.run([*pip, TORCH_PIN, "numpy", "ninja", "psutil", "setuptools", "wheel"], check=True)
    # Its build script imports torch, so it cannot be built in isolation.
    subprocess.run([*pip, "--no-build-isolation", TORCH_PIN, ORIGINAL_PIN], check=True)
    finished.touch()
    return python


def child_environment(interpreter: Interpreter, threads: int) -> dict[str, str]:
    """Take the caller's environment, drop its Python and torchrun settings, set one thread count for all."""
    dropped = ("PYTHONPATH", "PYTHONHOME", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    count = str(threads)
    kept.update(OMP_NUM_THREADS=count, MKL_NUM_THREADS=count, OPENBLAS_NUM_THREADS=count)
    # Compiled operators call ninja, which stands beside the interpreter.
    kept["PATH"] = f"{interpreter.python.parent}{os.pathsep}{kept.get('PATH', os.defpath)}"
    kept["TORCH_EXTENSIONS_DIR"] = str(interpreter.extensions)
    kept.update(interpreter.variables)
    return kept


def free_port() -> int:
    """Ask the system for a port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def run_ranks(
    interpreter: Interpreter,
    script: Path,
    arguments: Sequence[str],
    *,
    ranks: int,
    threads: int,
    limit: float = 900.0,
) -> list[dict[str, Any]]:
    """Run `script` once per rank and return the JSON each rank wrote to `OUT/rankR.json`.

    Raises RunFailed with the end of the first failing rank's output, or when `limit` seconds have passed.
    """
    environment = child_environment(interpreter, threads)
    environment.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), WORLD_SIZE=str(ranks))
    environment["LOCAL_WORLD_SIZE"] = str(ranks)
    command = [str(interpreter.python), str(script), *arguments]
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        out = Path(folder)
        children = [
            _start([*command, "--out", folder], {**environment, "RANK": str(r), "LOCAL_RANK": str(r)}, out, r)
            for r in range(ranks)
        ]
        try:
            _wait(children, out, limit)
        finally:
            _end(children, interpreter)
        return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(ranks)]


def _start(command: list[str], environment: dict[str, str], out: Path, rank: int) -> subprocess.Popen[bytes]:
    with (out / f"rank{rank}.log").open("wb") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=out)


def _wait(children: list[subprocess.Popen[bytes]], out: Path, limit: float) -> None:
    deadline = time.monotonic() + limit
    while any(child.poll() is None for child in children):
        _check(children, out)
        if time.monotonic() > deadline:
            raise RunFailed(_story(out, 0, f"did not end in {limit:.0f} s"))
        time.sleep(0.05)
    _check(children, out)


def _check(children: list[subprocess.Popen[bytes]], out: Path) -> None:
    """Raise for a rank that ended without its record.

    One that fails after writing it is let pass: now and then torch's gloo aborts while two ranks close their
    groups at different moments, and the end of the process is not measured.
    """
    for rank, child in enumerate(children):
        if child.poll() is not None and not (out / f"rank{rank}.json").exists():
            raise RunFailed(_story(out, rank, f"ended with exit code {child.returncode} and no result"))


def _story(out: Path, rank: int, what: str) -> str:
    lines = (out / f"rank{rank}.log").read_text(errors="replace").splitlines()
    return "\n".join([f"rank {rank} {what}; its last lines:", *lines[-25:]])


def _end(children: list[subprocess.Popen[bytes]], interpreter: Interpreter) -> None:
    running = [child for child in children if child.poll() is None]
    for child in running:
        child.kill()
    for child in running:
        child.wait()
    if running:
        # A rank killed while it compiled leaves a lock that would hold up every later run.
        for lock in interpreter.extensions.glob("*/*/lock"):
            lock.unlink(missing_ok=True)
