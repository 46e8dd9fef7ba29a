"""A job that resumes, says where, and then trains and saves after every step until it is killed.

Started by kills.py. It says: `resumed STEP WEIGHTS`, `expected WEIGHTS` of a run that was never stopped, `saved STEP`.
"""

from __future__ import annotations

import argparse
import zlib
from typing import Any

import torch
from torch import nn

import deepspeed

WIDTH = 1024


def main() -> None:
    """Resume, compare, and go on for ever."""
    options = parse()
    engine = make_engine(options.background)
    engine.load_checkpoint(options.folder)
    steps = engine.global_steps
    print("resumed", steps, fingerprint(engine), flush=True)
    never_stopped = make_engine(background=False)
    for _ in range(steps):
        train(never_stopped)
    print("expected", fingerprint(never_stopped), flush=True)
    never_stopped.destroy()
    while True:
        train(engine)
        engine.save_checkpoint(options.folder)
        if options.background:
            train(engine)
            engine.finish_saving()
            print("saved", engine.global_steps - 1, flush=True)
        else:
            print("saved", engine.global_steps, flush=True)


def make_engine(background: bool) -> Any:
    """Make an engine that is the same in every job."""
    torch.manual_seed(0)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "checkpoint": {"keep_last": 2, "writer": {"decoupled": background}},
    }
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
    return deepspeed.initialize(model=model, config=config)[0]


def train(engine: Any) -> None:
    """Take one step on data that depends on its number."""
    generator = torch.Generator().manual_seed(engine.global_steps)
    batch = torch.randn(4, WIDTH, generator=generator, dtype=torch.float32).bfloat16()
    engine.backward(engine(batch).float().square().mean())
    engine.step()


def fingerprint(engine: Any) -> str:
    """Return a checksum of weights, masters and moments."""
    checksum = 0
    states = engine.optimizer.state
    masters = [param for group in engine.optimizer.param_groups for param in group["params"]]
    for value in [*engine.module.parameters(), *masters, *(s for m in masters for s in states[m].values())]:
        if isinstance(value, torch.Tensor) and value.dim() > 0:
            checksum = zlib.crc32(
                value.detach().contiguous().view(torch.uint8).view(-1).numpy().tobytes(), checksum
            )
    return f"{checksum:08x}"


def parse() -> argparse.Namespace:
    """Read the command line kills.py writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", required=True, help="of the checkpoints")
    parser.add_argument("--background", action="store_true", help="save while training goes on")
    return parser.parse_args()


if __name__ == "__main__":
    main()
