"""Command-line arguments that training scripts share."""

from __future__ import annotations

import argparse


def add_config_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add ``--deepspeed``, ``--deepspeed_config`` and their older spellings to a parser, and return it."""
    group = parser.add_argument_group("DeepSpeed", "DeepSpeed configurations")
    group.add_argument("--deepspeed", action="store_true", help="train with DeepSpeed")
    group.add_argument("--deepspeed_config", metavar="FILE", help="path of the JSON configuration")
    group.add_argument("--deepscale", action="store_true", dest="deepspeed", help=argparse.SUPPRESS)
    group.add_argument("--deepscale_config", dest="deepspeed_config", help=argparse.SUPPRESS)
    return parser
