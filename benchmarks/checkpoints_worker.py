"""One rank that trains a step, saves, and loads what it saved, and writes what that took as JSON.

Started by checkpoints.py, which sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from meter import Memory, resident, write_record
from model import Shape, batches, build_model
from rows import Recipe, Row, engine_config

import deepspeed


def main() -> None:
    """Save and load once and write `OUT/rankR.json`."""
    options = parse()
    shape = Shape(**json.loads(options.shape))
    rank = int(os.environ["RANK"])
    deepspeed.init_distributed(dist_backend="gloo")
    config = engine_config(Recipe(Row(options.kind, options.stage, ""), shape.batch, 1, ""), largest=0)
    if options.later:
        config["checkpoint"] = {"writer": {"decoupled": True}}
    model = build_model(shape, checkpointing=True)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    drawn = iter(batches(shape, rank, 4))
    train(engine, *next(drawn))
    usual = measured(lambda: train(engine, *next(drawn)))["seconds"]
    began = time.perf_counter()
    saved = measured(lambda: engine.save_checkpoint(options.folder))
    if options.later:
        waited = time_copies(engine)
        step = measured(lambda: train(engine, *next(drawn)))
        slower = max(0.0, step["seconds"] - usual)
        saved = {
            "seconds": saved["seconds"] + slowest(sum(waited)),
            "slower": slower,
            "extra": max(saved["extra"], step["extra"]),
        }
        engine.finish_saving()
    dist.barrier()
    os.sync()
    durable = time.perf_counter() - began
    if not options.later:
        train(engine, *next(drawn))
    dist.barrier()
    forget_cached(Path(options.folder))
    dist.barrier()
    loaded = measured(lambda: engine.load_checkpoint(options.folder))
    loss = train(engine, *batches(shape, rank, 5)[-1])
    record = {
        "save": saved,
        "durable": durable,
        "load": loaded,
        "loss": loss,
        "bytes": sum(path.stat().st_size for path in Path(options.folder).rglob("*") if path.is_file()),
        "versions": {"torch": str(torch.__version__), "deepspeed": str(deepspeed.__version__)},
    }
    write_record(options.out, rank, record)
    dist.barrier()
    dist.destroy_process_group()


def train(engine: Any, *batch: torch.Tensor) -> float:
    """Take one step; return the loss."""
    loss = engine(*batch)
    engine.backward(loss)
    engine.step()
    return float(loss)


def measured(action: Callable[[], Any]) -> dict[str, float]:
    """Run something on all ranks; return the seconds of the slowest, and the bytes it needed at its peak."""
    dist.barrier()
    memory, before = Memory(), resident()
    memory.restart()
    began = time.perf_counter()
    action()
    seconds = slowest(time.perf_counter() - began)
    return {"seconds": seconds, "extra": max(0, memory.peak() - before)}


def slowest(seconds: float) -> float:
    """Return the seconds of the slowest rank."""
    mine = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(mine, op=dist.ReduceOp.MAX)
    return float(mine)


def time_copies(engine: Any) -> list[float]:
    """Let the seconds for which an update waits for a save to copy what it has not written yet be listed."""
    states, waited = engine.optimizer.states, []
    copy = states.before_change

    def timed() -> None:
        began = time.perf_counter()
        copy()
        waited.append(time.perf_counter() - began)

    states.before_change = timed
    return waited


def forget_cached(folder: Path) -> None:
    """Let the system forget what it has of the files in memory, as after a restart of the machine."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def parse() -> argparse.Namespace:
    """Read the command line checkpoints.py writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", required=True, help="ours or original")
    parser.add_argument("--stage", type=int, required=True)
    parser.add_argument("--later", action="store_true", help="save while training goes on")
    parser.add_argument("--shape", required=True, help="the fields of Shape as JSON")
    parser.add_argument("--folder", required=True, help="of the checkpoints")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
