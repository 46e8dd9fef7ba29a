"""The command line: what can be set, what it defaults to, and one sentence for what cannot be used."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import hjson

import deepspeed
from gpt.errors import UserError
from gpt.model import Shape
from gpt.weights import read_shape

EXAMPLES = Path(__file__).resolve().parent.parent
STEPS, MINUTES = 800, 4
DEFAULT_SHAPE = {"layers": 4, "dim": 192, "heads": None, "seq": 256}


class Parser(argparse.ArgumentParser):
    """A parser that raises, so that several ranks say what is wrong once."""

    def error(self, message: str) -> NoReturn:
        """Raise the problem instead of printing it."""
        raise UserError(f"{message}; --help lists what there is")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line and check every number in it."""
    args = build_parser().parse_args(arguments)
    for name in (
        "layers",
        "dim",
        "heads",
        "seq",
        "batch",
        "steps",
        "minutes",
        "lr",
        "temperature",
        "sample_bytes",
    ):
        value = getattr(args, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise UserError(f"--{name.replace('_', '-')}: expected a number above 0, got {value}")
    if args.steps is None:
        args.steps, args.minutes = STEPS, args.minutes or MINUTES
    return args


def build_parser() -> Parser:
    """Return the parser with this script's options and DeepSpeed's own."""
    parser = Parser(description="Train a byte-level GPT on text.", allow_abbrev=False)
    add = parser.add_argument
    add("--data", nargs="+", default=[], metavar="PATH", help="files or folders (default: Python's own text)")
    add("--output", default="runs/gpt", metavar="FOLDER", help="where results go (default: %(default)s)")
    add("--layers", type=int, help="transformer layers (default: 4; GPT-2 XL: 48)")
    add("--dim", type=int, help="model width (default: 192; GPT-2 XL: 1600)")
    add("--heads", type=int, help="attention heads (default: one for each 64 of the width)")
    add("--seq", type=int, help="bytes in one sequence (default: 256; GPT-2 XL: 1024)")
    add("--batch", type=int, help="sequences per rank and step (default: the configuration's)")
    add("--steps", type=int, help=f"optimizer steps (default: {STEPS}, or what {MINUTES} minutes allow)")
    add("--minutes", type=float, help="stop then, wherever training is (default: none with --steps)")
    add("--lr", type=float, help="highest learning rate (default: the configuration's)")
    add("--seed", type=int, default=0, help="of weights, order of the text and sample (default: %(default)s)")
    add("--init-from", metavar="FILE", help="weights to start from: model.safetensors of an earlier run")
    add("--prompt", default="def ", help="what the sample starts with (default: %(default)r)")
    add("--sample-bytes", type=int, default=400, help="length of the sample (default: %(default)s)")
    add("--temperature", type=float, default=0.8, help="below 1: likelier bytes (default: %(default)s)")
    add("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # some launchers pass it
    return deepspeed.add_config_arguments(parser)  # type: ignore[return-value]


def model_shape(args: argparse.Namespace) -> Shape:
    """Return the model's sizes: those of the weights to start from, else the options'."""
    given = {name: getattr(args, name) for name in DEFAULT_SHAPE if getattr(args, name) is not None}
    if args.init_from is not None:
        return _shape_of_weights(Path(args.init_from), given)
    sizes = {**DEFAULT_SHAPE, **given}
    if sizes["heads"] is None:
        sizes["heads"] = max(1, sizes["dim"] // 64)
    if sizes["dim"] % (2 * sizes["heads"]):
        raise UserError(
            f"--dim: expected a multiple of twice --heads ({2 * sizes['heads']}), got {sizes['dim']}; "
            "change one of them"
        )
    return Shape(**sizes)


def _shape_of_weights(weights: Path, given: dict[str, int]) -> Shape:
    shape = read_shape(weights)
    for name, value in given.items():
        if value != getattr(shape, name):
            raise UserError(
                f"--{name}: {weights} has {getattr(shape, name)}, got {value}; "
                f"leave --{name} out when you start from weights"
            )
    return shape


def deepspeed_config(args: argparse.Namespace) -> dict[str, Any]:
    """Read the configuration file and put in what the command line decides: batch, lr, number of steps."""
    path = Path(args.deepspeed_config or EXAMPLES / "ds_config.json")
    config = _read_json(path)
    if not config.get("optimizer"):
        raise UserError(
            f"--deepspeed_config: {path} has no section optimizer, which this script trains with; add it"
        )
    if args.batch is not None:
        config.pop("train_batch_size", None)
        config["train_micro_batch_size_per_gpu"] = args.batch
    if args.lr is not None:
        _section(config, "optimizer")["lr"] = args.lr
    schedule = _section(config, "scheduler")
    if schedule.get("total_num_steps") == "auto":
        schedule["total_num_steps"] = args.steps
        schedule["warmup_num_steps"] = min(schedule.get("warmup_num_steps", 40), max(1, args.steps // 5))
    return config


def _section(config: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the section's params; an empty dict that nobody reads where the section is absent."""
    section = config.get(name)
    return section.setdefault("params", {}) if isinstance(section, dict) else {}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        config = hjson.loads(path.read_text(encoding="utf-8"), object_pairs_hook=dict)
    except OSError as error:
        raise UserError(f"--deepspeed_config: {path} cannot be read: {error.strerror}") from error
    except (hjson.HjsonDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--deepspeed_config: {path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"--deepspeed_config: {path} must hold one JSON object")
    return config
