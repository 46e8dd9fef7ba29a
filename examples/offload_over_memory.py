"""Train a model whose optimizer states do not fit in memory: they lie on disk.

    python examples/offload_over_memory.py                      both of these, one after the other
    python examples/offload_over_memory.py --device none        states in memory: fails, in one sentence
    python examples/offload_over_memory.py --device nvme        states on disk: trains

The limit is real (--memory, in MiB): the system refuses a process more than that beside what Python and torch take.
Linux only, and on the host: the memory of a GPU has no such limit. One rank; with N ranks each needs an N-th.
"""

from __future__ import annotations

import os
import sys

os.environ["DS_ACCELERATOR"] = "cpu"

import argparse
import re
import resource
import subprocess
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from gpt.data import Windows, load_corpus
from gpt.model import GPT, Shape
from gpt.steps import run_steps

import deepspeed
from deepspeed import comm
from deepspeed.utils import RepeatingLoader

MIB = 2**20
OUT_OF_MEMORY = 3  # exit code
GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": str(256 * 1024)}
"""Has glibc give freed blocks of this size back; otherwise they are kept for the next step, and count here."""
REFUSALS = ("allocate memory", "start new thread")  # the system's, as torch and Python report them
CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "bf16": {"enabled": True},
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.95], "weight_decay": 0.1}},
}
ZERO = {
    "stage": 2,
    "reduce_bucket_size": 4_000_000,  # elements of a unit: the gradients of two are in memory at a time
    "sub_group_size": 500_000,  # elements of a tile: 6 MB of states, in each of 4 + 3 buffers
}


def main() -> int:
    """Run what was asked for; return the exit code."""
    args = parse()
    if args.device is not None:
        return train(args)
    code = again("none")
    if code == 0:
        print(f"{args.memory:g} MiB are enough without offload; choose less with --memory.", file=sys.stderr)
        return 1
    return again("nvme") if code == OUT_OF_MEMORY else code


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train a model whose optimizer states do not fit in memory.")
    add = parser.add_argument
    add(
        "--device", choices=["none", "nvme"], help="where optimizer states are (default: one after the other)"
    )
    add("--memory", type=float, default=192, help="MiB a process may take for training (%(default)s)")
    add("--folder", type=Path, default=Path("runs", "offload"), help="where they are on disk (%(default)s)")
    add("--steps", type=int, default=10, help="optimizer steps (%(default)s)")
    add("--layers", type=int, default=6, help="transformer layers (%(default)s)")
    add("--dim", type=int, default=512, help="model width (%(default)s)")
    add("--seq", type=int, default=64, help="bytes in one sequence (%(default)s)")
    add("--data", nargs="+", default=[], metavar="PATH", help="files or folders of text (Python's own)")
    return parser.parse_args()


def again(device: str) -> int:
    """Run this command in a process of its own, which the limit ends with."""
    command = [sys.executable, *sys.argv, "--device", device]
    return subprocess.run(command, env={**os.environ, **GIVEN_BACK}, check=False).returncode


def train(args: argparse.Namespace) -> int:
    """Set the limit, build, train, print one sentence on how it ended; return the exit code."""
    windows = Windows(load_corpus(args.data, args.seq).train, args.seq)
    args.folder.mkdir(parents=True, exist_ok=True)
    warm_up(args, windows)
    at_start = status("VmRSS")
    limit(args.memory)
    try:
        engine, loader = build(
            Shape(args.layers, args.dim, heads=8, seq=args.seq), args, windows, args.device
        )
        run_steps(engine, iter(RepeatingLoader(loader)), args.steps, engine)
    except (MemoryError, RuntimeError) as error:
        if not any(text in str(error) for text in REFUSALS) and not isinstance(error, MemoryError):
            raise
        print(f"States in memory: {args.memory:g} MiB are too little; {reason(error)}.", flush=True)
        return OUT_OF_MEMORY
    used = (status("VmHWM") - at_start) / MIB
    print(f"{where(engine)}: trained within {args.memory:g} MiB, of which {used:.0f} were used.", flush=True)
    engine.destroy()
    comm.destroy_process_group()
    return 0


def build(
    shape: Shape, args: argparse.Namespace, windows: Windows, device: str
) -> tuple[deepspeed.DeepSpeedEngine, Iterable[Any]]:
    """Make a model and its engine; return the engine and the loader."""
    torch.manual_seed(0)
    place = {"device": device, "nvme_path": str(args.folder)}
    config = {**CONFIG, "zero_optimization": {**ZERO, "offload_optimizer": place}}
    engine, _, loader, _ = deepspeed.initialize(model=GPT(shape), training_data=windows, config=config)
    return engine, loader


def warm_up(args: argparse.Namespace, windows: Windows) -> None:
    """Take a step with a small model, so that all code is loaded and all threads run before memory is counted."""
    threading.stack_size(MIB)
    engine, loader = build(Shape(1, 64, heads=8, seq=args.seq), args, windows, "nvme")
    tokens, targets = next(iter(loader))
    engine.backward(engine(tokens, targets))
    engine.step()
    engine.destroy()


def limit(mebibytes: float) -> None:
    """Let this process take so much memory more."""
    most = status("VmData") + int(mebibytes * MIB)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def status(key: str) -> int:
    """Return bytes that the system counts for this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def where(engine: deepspeed.DeepSpeedEngine) -> str:
    """Say what lies where."""
    report = engine.memory_report()
    if report.on_disk:
        return f"States on disk ({report.on_disk / MIB:.0f} MiB)"
    return f"States in memory ({(report.masters + report.optimizer) / MIB:.0f} MiB)"


def reason(error: Exception) -> str:
    """Return the part of an allocator's message that tells what was wanted."""
    found = re.search(r"tried to allocate (\d+) bytes", str(error))
    return (
        f"the system refused {int(found[1]) / MIB:.0f} MiB more"
        if found
        else str(error) or type(error).__name__
    )


if __name__ == "__main__":
    sys.exit(main())
