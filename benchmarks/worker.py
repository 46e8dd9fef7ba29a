"""One rank of one row: trains the model for some steps and writes what it measured as JSON.

Started by compare.py, which sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from meter import Memory, disk_traffic, write_record
from model import Shape, batches, build_model
from rows import Recipe, Trainer, make_trainer, split_row
from torch import Tensor


def main() -> None:
    """Train one row and write `OUT/rankR.json`."""
    options = parse()
    torch.set_num_threads(options.threads)
    shape = Shape(**json.loads(options.shape))
    rank = int(os.environ["RANK"])
    row = split_row(options.row)
    began = time.perf_counter()
    start_group(row.kind)
    model = build_model(shape, options.checkpointing)
    trainer = make_trainer(Recipe(row, shape.batch, options.accumulation, options.swap), model)
    record = train(trainer, shape, rank, options, began)
    record["versions"] = versions(row.kind)
    write_record(options.out, rank, record)
    dist.barrier()
    dist.destroy_process_group()


def parse() -> argparse.Namespace:
    """Read the command line compare.py writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--row", required=True)
    parser.add_argument("--shape", required=True, help="the fields of Shape as JSON")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--warmup", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--accumulation", type=int, required=True, help="micro-batches of a step")
    parser.add_argument("--checkpointing", action="store_true", help="run the blocks again in backward")
    parser.add_argument("--swap", required=True, help="folder for states on disk")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def start_group(kind: str) -> None:
    """Start gloo the way the row's users do."""
    if kind in ("ours", "original"):
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo")
    else:
        dist.init_process_group("gloo")


def train(
    trainer: Trainer, shape: Shape, rank: int, options: argparse.Namespace, began: float
) -> dict[str, Any]:
    """Run warm-up and timed steps; times in seconds, memory in bytes."""
    memory = Memory()
    phases: dict[str, list[float]] = {"forward": [], "backward": [], "step": [], "total": [], "cpu": []}
    losses: list[float] = []
    ready = 0.0
    before: int | None = None
    traffic = 0
    count = options.accumulation
    drawn = batches(shape, rank, count * (options.warmup + options.steps))
    for index in range(options.warmup + options.steps):
        if index == options.warmup:
            memory.restart()
            before, traffic = trainer.gathers(), disk_traffic()
            dist.barrier()
        spans, loss = run_step(trainer, drawn[index * count : (index + 1) * count])
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


def run_step(trainer: Trainer, micro_batches: list[tuple[Tensor, Tensor]]) -> tuple[dict[str, float], float]:
    """Run the micro-batches of one step; return the seconds of each phase, summed, and the mean loss."""
    spans = dict.fromkeys(("forward", "backward", "step"), 0.0)
    losses = []
    cpu, began = time.process_time(), time.perf_counter()
    for number, batch in enumerate(micro_batches, start=1):
        trainer.announce(number == len(micro_batches))
        stamps = [time.perf_counter()]
        loss = trainer.forward(*batch)
        stamps.append(time.perf_counter())
        trainer.backward(loss)
        stamps.append(time.perf_counter())
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
