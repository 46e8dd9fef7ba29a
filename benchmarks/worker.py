"""One rank of one row: trains the model for some steps and writes what it measured as JSON.

Started by compare.py, which sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from meter import Memory, disk_traffic, write_record
from model import batches, build_model
from rows import Recipe, Trainer, make_trainer, split_row
from torch import Tensor
from work import Work, read_work


def main() -> None:
    """Train one row and write `OUT/rankR.json`."""
    options = parse()
    rank = int(os.environ["RANK"])
    began = time.perf_counter()
    work, trainer = start(options)
    record = train(trainer, work, rank, options, began)
    record["versions"] = versions(split_row(options.row).kind)
    write_record(options.out, rank, record)
    dist.barrier()
    dist.destroy_process_group()


def parse() -> argparse.Namespace:
    """Read the command line that launch.py's callers write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--row", required=True)
    parser.add_argument("--work", required=True, help="the fields of Work as JSON")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--warmup", type=int, required=True)
    parser.add_argument("--swap", required=True, help="folder for states on disk")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def start(options: argparse.Namespace) -> tuple[Work, Trainer]:
    """Start the group and build the row's trainer."""
    work, row = read_work(json.loads(options.work)), split_row(options.row)
    torch.set_num_threads(work.threads)
    start_group(row.kind)
    model = build_model(work.shape, work.checkpointing)
    recipe = Recipe(row, work.shape.batch, work.accumulation, options.swap, work.precision)
    return work, make_trainer(recipe, model)


def start_group(kind: str, backend: str = "gloo") -> None:
    """Start the process group the way the row's users do."""
    if kind in ("ours", "original"):
        import deepspeed

        deepspeed.init_distributed(dist_backend=backend)
    else:
        dist.init_process_group(backend)


def train(
    trainer: Trainer, work: Work, rank: int, options: argparse.Namespace, began: float
) -> dict[str, Any]:
    """Run warm-up and timed steps; times in seconds, memory in bytes."""
    memory = Memory()
    phases: dict[str, list[float]] = {"forward": [], "backward": [], "step": [], "total": [], "cpu": []}
    losses: list[float] = []
    ready = 0.0
    before: int | None = None
    traffic = 0
    for index, micro_batches in enumerate(draw_steps(work, rank, options.warmup + options.steps)):
        if index == options.warmup:
            memory.restart()
            before, traffic = trainer.gathers(), disk_traffic()
            dist.barrier()
        spans, loss = run_step(trainer, micro_batches)
        losses.append(loss)
        ready = ready or time.perf_counter() - began
        if index >= options.warmup:
            for name, seconds in spans.items():
                phases[name].append(seconds)
    return {
        "seconds": phases,
        "losses": mean_over_ranks(losses),
        "first_step": ready,
        "gathers": per_step(before, trainer.gathers(), options.steps),
        "disk": (disk_traffic() - traffic) / options.steps,
        "peak": memory.life_peak(),
        "peak_training": memory.peak(),
    }


def draw_steps(work: Work, rank: int, steps: int) -> list[list[tuple[Tensor, Tensor]]]:
    """Draw the micro-batches of every step."""
    count = work.accumulation
    drawn = batches(work.shape, rank, count * steps)
    return [drawn[index * count : (index + 1) * count] for index in range(steps)]


def run_step(
    trainer: Trainer,
    micro_batches: list[tuple[Tensor, Tensor]],
    around: Callable[[str], AbstractContextManager[object]] = nullcontext,
) -> tuple[dict[str, float], float]:
    """Run the micro-batches of one step, each phase within `around` its name.

    Returns the seconds of each phase, summed, and the mean loss.
    """
    spans = dict.fromkeys(("forward", "backward", "step"), 0.0)
    losses = []
    cpu, began = time.process_time(), time.perf_counter()
    for number, batch in enumerate(micro_batches, start=1):
        trainer.announce(number == len(micro_batches))
        stamps = [time.perf_counter()]
        with around("forward"):
            loss = trainer.forward(*batch)
        stamps.append(time.perf_counter())
        with around("backward"):
            trainer.backward(loss)
        stamps.append(time.perf_counter())
        with around("step"):
            trainer.step()
        stamps.append(time.perf_counter())
        losses.append(loss.detach())
        for name, (early, late) in zip(spans, pairwise(stamps), strict=True):
            spans[name] += late - early
    whole = {"total": time.perf_counter() - began, "cpu": time.process_time() - cpu}
    return spans | whole, torch.stack(losses).mean().item()


def per_step(before: int | None, after: int | None, steps: int) -> float | None:
    """Share what was counted among the timed steps."""
    return None if before is None or after is None else (after - before) / steps


def mean_over_ranks(losses: list[float]) -> list[float]:
    """Average the losses over ranks, so that every row reports the loss of the whole batch."""
    total = torch.tensor(losses, dtype=torch.float64)
    dist.all_reduce(total)
    mean: list[float] = (total / dist.get_world_size()).tolist()
    return mean


def versions(kind: str) -> dict[str, str]:
    """Name what was measured."""
    found = {"torch": str(torch.__version__)}
    if kind in ("ours", "original"):
        import deepspeed

        found["deepspeed"] = str(deepspeed.__version__)
    return found


if __name__ == "__main__":
    main()
