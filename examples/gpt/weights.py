"""Trained weights on disk: `model.safetensors`, and beside it `model.json` with the sizes of the model."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from gpt.errors import UserError
from gpt.model import GPT, Shape

WEIGHTS = "model.safetensors"


def make_folder(folder: Path) -> None:
    """Make the folder for results."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output: {folder} cannot be made: {error.strerror}") from error


def write_shape(folder: Path, shape: Shape) -> None:
    """Write the sizes that `read_shape` needs."""
    (folder / WEIGHTS).with_suffix(".json").write_text(json.dumps(asdict(shape), indent=2) + "\n")


def read_shape(weights: Path) -> Shape:
    """Return the sizes of the model whose weights are in the file `weights`."""
    beside = weights.with_suffix(".json")
    for path in (weights, beside):
        if not path.is_file():
            raise UserError(f"--init-from: {path} does not exist; give the {WEIGHTS} of an earlier run")
    try:
        return Shape(**json.loads(beside.read_text()))
    except (TypeError, ValueError) as error:
        raise UserError(f"--init-from: {beside} does not describe a model: {error}") from error


def load_weights(model: GPT, weights: Path) -> None:
    """Put the weights in the file into `model`; they are cast to its dtype."""
    try:
        model.load_state_dict(load_file(weights))
    except (SafetensorError, RuntimeError) as error:
        raise UserError(f"--init-from: {weights} does not fit the model: {error}") from error
