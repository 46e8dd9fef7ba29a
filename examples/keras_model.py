"""Train a Keras 3 model with ZeRO: on Keras' torch backend every model is a torch.nn.Module.

    python examples/keras_model.py                                 one rank
    deepspeed --num_gpus 2 examples/keras_model.py --stage 3       two ranks, weights sharded

The model learns on which side of a spiral a point lies. At the end its weights are gathered and saved by Keras
itself. Needs ``pip install keras``.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ["KERAS_BACKEND"] = "torch"  # read when keras is imported

import torch
from torch.utils.data import TensorDataset

import deepspeed
from deepspeed import comm
from deepspeed.utils import RepeatingLoader
from deepspeed.zero import GatheredParameters

try:
    import keras
except ImportError:
    sys.exit("keras_model: keras is not installed; pip install keras")


def main() -> None:
    """Build, train, save."""
    args = parse()
    keras.utils.set_random_seed(0)
    engine, _, loader, _ = deepspeed.initialize(
        model=classifier(),
        training_data=spiral(512),
        config={
            "train_micro_batch_size_per_gpu": 32,
            "optimizer": {"type": "AdamW", "params": {"lr": 2e-2}},
            "zero_optimization": {"stage": args.stage, "stage3_param_persistence_threshold": 100},
        },
    )
    batches = iter(RepeatingLoader(loader))
    for step in range(1, args.steps + 1):
        points, sides = next(batches)
        loss = torch.nn.functional.cross_entropy(engine(points, training=True), sides)
        engine.backward(loss)
        engine.step()
        if comm.get_rank() == 0 and (step == 1 or step % 20 == 0):
            print(f"step {step}/{args.steps}  loss {loss.item():.3f}")
    with GatheredParameters(engine.module.parameters()):  # every rank takes part, the first one writes
        if comm.get_rank() == 0:
            Path(args.output).parent.mkdir(parents=True, exist_ok=True)
            engine.module.save_weights(args.output)
            print(f"Saved {engine.module.count_params():,} weights in {args.output}.")
    engine.destroy()
    comm.destroy_process_group()


def classifier() -> keras.Model:
    """Return two hidden layers as Keras writes them."""
    layers = keras.layers
    hidden = [
        layers.Dense(64, activation="gelu"),
        layers.LayerNormalization(),
        layers.Dense(64, activation="gelu"),
    ]
    return keras.Sequential([keras.Input((2,)), *hidden, layers.Dense(2)])


def spiral(count: int) -> TensorDataset:
    """Return points of two arms of a spiral, and which arm each is on."""
    turn = torch.linspace(0.25, 1, count)
    side = torch.arange(count) % 2
    angle = 2 * torch.pi * turn + torch.pi * side
    return TensorDataset(torch.stack([turn * angle.cos(), turn * angle.sin()], dim=1), side)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train a Keras model with ZeRO.")
    add = parser.add_argument
    add("--stage", type=int, default=2, choices=range(4), help="of ZeRO (%(default)s)")
    add("--steps", type=int, default=100, help="optimizer steps (%(default)s)")
    add(
        "--output",
        default="runs/spiral.weights.h5",
        metavar="FILE",
        help="where the weights go (%(default)s)",
    )
    add("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # some launchers pass it
    return parser.parse_args()


if __name__ == "__main__":
    main()
