"""One row of gpu.py: trains on the device, times whole steps and their phases apart, and may profile some.

Run by gpu.py in the interpreter whose `deepspeed` is measured.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gpu_device
import torch
import torch.distributed as dist
from gpu_trace import MARK, read_trace
from meter import Memory, write_record
from model import build_model
from rows import EngineTrainer, Recipe, split_row
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from work import Work, read_work
from worker import draw_steps, run_step, start_group, versions

APART, PROFILED = 3, 2
"""Steps whose phases are timed one by one, and steps that are profiled."""

Steps = list[list[tuple[Tensor, Tensor]]]


def main() -> None:
    """Train one row and write `OUT/rank0.json`."""
    options = parse()
    work, row = read_work(json.loads(options.work)), split_row(options.row)
    memory, began = Memory(), time.perf_counter()
    torch.set_num_threads(work.threads)
    start_group(row.kind, gpu_device.backend())
    with torch.device(gpu_device.kind()):
        model = build_model(work.shape, work.checkpointing)
    recipe = Recipe(row, work.shape.batch, work.accumulation, precision=work.precision)
    trainer = EngineTrainer(model, recipe)
    if options.compile:
        trainer.engine.compile()
    record = train(trainer, work, options, began)
    record |= {"peak": memory.life_peak(), "peak_training": memory.peak(), "gathers": None, "disk": 0.0}
    record |= {"device": gpu_device.name(), "versions": versions(row.kind)}
    write_record(options.out, 0, record)
    dist.destroy_process_group()


def parse() -> argparse.Namespace:
    """Read the command line that gpu.py writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--row", required=True)
    parser.add_argument("--work", required=True, help="the fields of Work as JSON")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--warmup", type=int, required=True)
    parser.add_argument("--compile", action="store_true", help="compile the model through the engine")
    parser.add_argument("--profile", action="store_true", help="look at copies and waits")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def train(trainer: EngineTrainer, work: Work, options: argparse.Namespace, began: float) -> dict[str, Any]:
    """Warm up, time, and look closer; times in seconds, memory in bytes."""
    count = options.warmup + options.steps + APART + PROFILED
    drawn = iter(on_device(draw_steps(work, 0, count)))
    losses = [run_step(trainer, next(drawn))[1]]
    ready = time.perf_counter() - began
    losses += [run_step(trainer, batches)[1] for batches in islice(drawn, options.warmup - 1)]
    gpu_device.restart_peak()
    seconds: dict[str, list[float]] = {"total": [], "cpu": []}
    for batches in islice(drawn, options.steps):
        cpu, start = time.process_time(), time.perf_counter()
        losses.append(run_step(trainer, batches)[1])
        gpu_device.synchronize()
        seconds["total"].append(time.perf_counter() - start)
        seconds["cpu"].append(time.process_time() - cpu)
    peak = gpu_device.peak_memory()
    seconds |= phases_apart(trainer, list(islice(drawn, APART)))
    return {
        "seconds": seconds,
        "losses": losses,
        "first_step": ready,
        "device_peak": peak,
        "use": asdict(profiled(trainer, list(drawn))) if options.profile else None,
    }


def on_device(steps: Steps) -> Steps:
    """Move micro-batches to the device, so that no step waits for them."""
    device = gpu_device.kind()
    return [[(ids.to(device), targets.to(device)) for ids, targets in batches] for batches in steps]


def phases_apart(trainer: EngineTrainer, steps: Steps) -> dict[str, list[float]]:
    """Time forward, backward and update, each from when the device is idle to when it is again."""
    seconds: dict[str, list[float]] = {"forward": [], "backward": [], "step": []}

    @contextmanager
    def around(phase: str) -> Iterator[None]:
        gpu_device.synchronize()
        start = time.perf_counter()
        yield
        gpu_device.synchronize()
        seconds[phase][-1] += time.perf_counter() - start

    for batches in steps:
        for spent in seconds.values():
            spent.append(0.0)
        run_step(trainer, batches, around)
    return seconds


def profiled(trainer: EngineTrainer, steps: Steps) -> Any:
    """Run steps under the profiler and read its trace."""
    activities = [ProfilerActivity.CPU]
    if gpu_device.kind() != gpu_device.HOST:
        activities.append(getattr(ProfilerActivity, gpu_device.kind().upper()))
    with profile(activities=activities) as seen:
        for batches in steps:
            run_step(trainer, batches, lambda phase: record_function(MARK + phase))
        gpu_device.synchronize()
    with TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(trace))
        return read_trace(json.loads(trace.read_text())["traceEvents"], len(steps))


if __name__ == "__main__":
    main()
