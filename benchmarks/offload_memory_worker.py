"""One rank that trains a large model for a few steps and writes what its memory held as JSON.

Started by offload_memory.py, which sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from meter import Memory, disk_traffic, resident_kinds, write_record
from model import GPT, Shape, batches
from rows import Recipe, Row, engine_config

import deepspeed


def main() -> None:
    """Train for some steps and write `OUT/rankR.json`."""
    options = parse()
    shape = Shape(**json.loads(options.shape))
    rank = int(os.environ["RANK"])
    deepspeed.init_distributed(dist_backend="gloo")
    torch.manual_seed(0)
    memory, began = Memory(), time.perf_counter()
    phases = {"start": phase(memory)}
    with deepspeed.zero.Init(dtype=torch.bfloat16):
        model = GPT(shape, checkpointing=True)
    phases["construction"] = phase(memory)
    config = engine_config(Recipe(Row("ours", 3, options.tier), shape.batch, 1, options.swap), largest=0)
    for name in ("stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_prefetch_bucket_size"):
        config["zero_optimization"][name] = options.live
    engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)
    phases["initialize"] = phase(memory)
    losses = []
    for number, batch in enumerate(batches(shape, rank, options.steps), start=1):
        loss = engine(*batch)
        engine.backward(loss)
        phases[f"backward {number}"] = phase(memory)
        engine.step()
        phases[f"update {number}"] = phase(memory)
        losses.append(loss.item())
    record = {
        "seconds": time.perf_counter() - began,
        "phases": phases,
        "peak": memory.life_peak(),
        "losses": losses,
        "disk": disk_traffic() / options.steps,
        "versions": {"torch": str(torch.__version__), "this project": str(deepspeed.__version__)},
    }
    write_record(options.out, rank, record)
    dist.barrier()
    engine.destroy()
    dist.destroy_process_group()


def phase(memory: Memory) -> dict[str, Any]:
    """Say what is resident now and what was at the peak since the last phase, in bytes."""
    figures = {"peak": memory.peak(), **resident_kinds()}
    memory.restart()
    return figures


def parse() -> argparse.Namespace:
    """Read the command line offload_memory.py writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", required=True, help="the fields of Shape as JSON")
    parser.add_argument("--tier", required=True, help="of tiers.py, or nothing")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--live", type=int, required=True, help="elements that may be whole at a time")
    parser.add_argument("--swap", required=True, help="folder for states on disk")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
