"""Times an engine against a bare torch loop in one process, turn about, on a model too small to matter.

Run by overhead.py in the interpreter whose `deepspeed` is measured.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from meter import write_record
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, BATCH, LR = 64, 8, 1e-3
LAYER = WIDTH * WIDTH + WIDTH  # elements
CHECK = 20


class MLP(nn.Module):
    """Layers of width 64 and a mean squared error."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(layers))

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        """Loss for `x` and `target`, both (batch, 64)."""
        for layer in self.layers:
            x = layer(x).relu()
        return F.mse_loss(x, target)


def build_model(layers: int) -> MLP:
    """Build the model, always the same."""
    torch.manual_seed(0)
    return MLP(layers)


def bare_loop(layers: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Make the training step everybody would write by hand."""
    model = build_model(layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=True)

    def step(x: Tensor, target: Tensor) -> Tensor:
        loss: Tensor = model(x, target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def engine_loop(stage: int, layers: int, together: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Make the same step with a DeepSpeed engine, in fp32; `together` layers are reduced at a time, 0: the default."""
    import deepspeed

    model = build_model(layers)
    bucket = {"reduce_bucket_size": together * LAYER} if together else {}
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=list(model.parameters()),
        config={
            "train_micro_batch_size_per_gpu": BATCH,
            "zero_optimization": {"stage": stage, **bucket},
            "optimizer": {"type": "AdamW", "params": {"lr": LR, "weight_decay": 0.0}},
        },
    )

    def step(x: Tensor, target: Tensor) -> Tensor:
        loss: Tensor = engine(x, target)
        engine.backward(loss)
        engine.step()
        return loss

    return step


def train(step: Callable[[Tensor, Tensor], Tensor], batch: tuple[Tensor, Tensor], count: int) -> float:
    """Return the loss after `count` steps."""
    for _ in range(count):
        step(*batch)
    return float(step(*batch))


def time_turn(step: Callable[[Tensor, Tensor], Tensor], batch: tuple[Tensor, Tensor], count: int) -> float:
    """Seconds a step, over `count` steps."""
    began = time.perf_counter()
    for _ in range(count):
        step(*batch)
    return (time.perf_counter() - began) / count


def main() -> None:
    """Alternate the two loops and write the seconds a step of every turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", type=int, required=True)
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--together", type=int, required=True, help="layers that are reduced at a time")
    parser.add_argument("--turns", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)

    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo")
    batch = (torch.randn(BATCH, WIDTH), torch.randn(BATCH, WIDTH))
    engine = engine_loop(options.stage, options.layers, options.together)
    loops = {"bare": bare_loop(options.layers), "engine": engine}
    # After as many steps on the same batch both must stand at the same loss.
    losses = {name: train(loop, batch, CHECK) for name, loop in loops.items()}
    for loop in loops.values():
        time_turn(loop, batch, options.steps)
    turns: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(options.turns):
        for name, loop in loops.items():
            turns[name].append(time_turn(loop, batch, options.steps))
    versions = {"torch": str(torch.__version__), "deepspeed": str(deepspeed.__version__)}
    write_record(options.out, 0, {"seconds": turns, "losses": losses, "versions": versions})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
