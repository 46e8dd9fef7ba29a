"""A Keras 3 model on the torch backend is trained by an engine as by plain PyTorch; so says its example, too."""

from __future__ import annotations

import os
import re
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harness import run_on_ranks
from twins import Twins, data

from deepspeed.zero import GatheredParameters

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from gpt_example import EXAMPLES, run


def keras_model():
    os.environ["KERAS_BACKEND"] = "torch"
    import keras

    layers = keras.layers
    keras.utils.set_random_seed(4)
    hidden = [
        layers.Dense(16, activation="tanh"),
        layers.LayerNormalization(),
        layers.Dense(16, activation="gelu"),
    ]
    return keras.Sequential([keras.Input((6,)), *hidden, layers.Dense(2)])


def loss_of(model, rank):
    return model(data(rank), training=True).square().mean()


@contextmanager
def keras_noise():
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "__array__ implementation doesn't accept a copy", DeprecationWarning
        )
        yield


def trains(stage, folder):
    with keras_noise():
        train_and_save(stage, folder)


def train_and_save(stage, folder):
    twins = Twins(keras_model(), stage=stage)
    for _ in range(3):
        twins.step(loss_of)
    module, path = twins.engine.module, os.path.join(folder, "trained.weights.h5")
    with GatheredParameters(module.parameters()):
        if dist.get_rank() == 0:
            module.save_weights(path)
    dist.barrier()
    read = keras_model()
    read.load_weights(path)
    expected = twins.plain(data(0), training=False)
    torch.testing.assert_close(read(data(0), training=False), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(module(data(0), training=False), expected, rtol=1e-4, atol=1e-5)
    with GatheredParameters(module.parameters()):
        for ours, plain in zip(module.get_weights(), twins.plain.get_weights(), strict=True):
            torch.testing.assert_close(torch.tensor(ours), torch.tensor(plain), rtol=1e-5, atol=1e-5)
    twins.engine.destroy()


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_keras_model_trains_and_saves_as_in_plain_pytorch(stage, tmp_path):
    run_on_ranks(2, trains, stage, str(tmp_path))


def running_averages():
    with keras_noise():
        move_averages()


def move_averages():
    os.environ["KERAS_BACKEND"] = "torch"
    import keras

    keras.utils.set_random_seed(4)
    layers = [
        keras.Input((6,)),
        keras.layers.Dense(8),
        keras.layers.BatchNormalization(),
        keras.layers.Dense(2),
    ]
    twins = Twins(keras.Sequential(layers))
    rank = dist.get_rank()
    before = [value.numpy().copy() for value in twins.plain.non_trainable_variables[:2]]
    for _ in range(2):
        twins.step(loss_of)
    with GatheredParameters(twins.engine.module.parameters()):
        ours = [value.numpy().copy() for value in twins.engine.module.non_trainable_variables[:2]]
    assert all((one != old).any() for one, old in zip(ours, before, strict=True)), rank
    twins.engine.destroy()


def test_running_averages_move_under_stage_3():
    run_on_ranks(2, running_averages)


def test_the_example_learns_and_saves_at_stage_3(tmp_path):
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2"]
    options = ["--stage", "3", "--steps", "60"]
    output = run([*launcher, str(EXAMPLES / "keras_model.py"), *options], folder=tmp_path)
    curve = [float(loss) for loss in re.findall(r"^step \d+/60  loss ([\d.]+)", output, re.MULTILINE)]
    assert curve[-1] < curve[0] / 2
    assert (tmp_path / "runs" / "spiral.weights.h5").exists()
    assert "Saved 4,610 weights" in output
