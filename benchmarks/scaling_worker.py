"""Simulates rank 0 of one job and writes what it counted as JSON. Started by scaling.py."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from llama import Llama, LlamaShape
from meter import write_record
from simulation import simulated
from torch import Tensor

import deepspeed
from deepspeed.comm.log import bus_factor, comms_logger

WARMUP, STEPS = 1, 3


def main() -> None:
    """Simulate and write `OUT/rank0.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", required=True, help="the fields of LlamaShape as JSON")
    parser.add_argument("--simulated-ranks", type=int, required=True)
    parser.add_argument("--stage", type=int, required=True)
    parser.add_argument("--seq", type=int, required=True, help="tokens of the one sample in a batch")
    parser.add_argument("--zero", default="{}", help="more keys of zero_optimization, as JSON")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    shape = LlamaShape(**json.loads(options.shape))
    record = simulate(shape, options.simulated_ranks, options.stage, options.seq, json.loads(options.zero))
    write_record(options.out, 0, record)


def simulate(shape: LlamaShape, ranks: int, stage: int, seq: int, zero: dict[str, Any]) -> dict[str, Any]:
    """Build an engine and train; return what rank 0 did in a step: bytes, counts and seconds."""
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "zero_optimization": {"stage": stage, **zero},
    }
    with simulated(ranks) as device:
        ids = torch.zeros(1, seq, dtype=torch.long, device=device)
        bare = bare_seconds(shape, ids)
        comms_logger.configure(enabled=True)
        began = time.process_time()
        with deepspeed.zero.Init(config_dict_or_path=config, enabled=stage == 3), device:
            model = Llama(shape)
        built = time.process_time()
        engine, *_ = deepspeed.initialize(model=model, config=config)
        ready = time.process_time()
        start = collectives()
        comms_logger.configure(enabled=False)
        seconds = timed(lambda: step(engine, ids))
        comms_logger.configure(enabled=True)
        gradients = step(engine, ids)
        report = engine.memory_report()
        engine.destroy()
        return {
            "versions": {"torch": torch.__version__, "deepspeed": deepspeed.__version__},
            "start": start,
            "step": collectives(),
            "memory": {
                "weights": report.parameters,
                "gradients": gradients,
                "states": report.masters + report.optimizer,
                "gathered": report.peak_gathered,
            },
            "seconds": {
                "bare": bare,
                "step": seconds,
                "construct": built - began,
                "initialize": ready - built,
            },
        }


def step(engine: Any, ids: Tensor) -> int:
    """Train on one batch; return the bytes of gradients that are kept before the update."""
    engine.backward(engine(ids, ids))
    kept: int = engine.memory_report().gradients
    engine.step()
    return kept


def bare_seconds(shape: LlamaShape, ids: Tensor) -> float:
    """Time forward and backward of the model alone: what fake tensors themselves cost."""
    with ids.device:
        model = Llama(shape)
    for param in model.parameters():
        param.data = param.data.bfloat16()
    return timed(lambda: model(ids, ids).backward())


def timed(run: Callable[[], object]) -> float:
    """Return the median processor seconds of some runs after others."""

    def once() -> float:
        began = time.process_time()
        run()
        return time.process_time() - began

    return median([once() for _ in range(WARMUP + STEPS)][WARMUP:])


def collectives() -> dict[str, dict[str, int | float]]:
    """Return what was called since the last time: calls, message bytes, and bytes a ring moves for them."""
    found: dict[str, dict[str, int | float]] = {}
    for (op, size), tally in comms_logger.tallies.items():
        kind = found.setdefault(op, {"calls": 0, "message": 0, "moved": 0.0})
        kind["calls"] += tally.count
        kind["message"] += tally.count * size
        kind["moved"] += tally.count * size * bus_factor(op, tally.world)
    comms_logger.reset()
    return found


if __name__ == "__main__":
    main()
