"""The command line of `deepspeed`, and what of it needs more than one node."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from deepspeed.common.logging import LEVELS
from deepspeed.errors import ConfigError, NotBuiltError
from deepspeed.launcher.hosts import DLTS_HOSTFILE
from deepspeed.version import __version__


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options; everything after the script belongs to the script.

    Raises ConfigError for options that contradict each other or a script that is not there, NotBuiltError
    for those that need several nodes.
    """
    options = parser().parse_args(arguments)
    _refuse_unbuilt(options)
    _check(options)
    return options


def parser() -> argparse.ArgumentParser:
    """Return the parser, one group of options after the other."""
    made = argparse.ArgumentParser(
        prog="deepspeed",
        description="Start a training script on several ranks of this machine.",
        allow_abbrev=False,
    )
    made.add_argument("--version", action="version", version=f"deepspeed {__version__}")
    _add_ranks(made)
    _add_meeting(made)
    _add_script(made)
    _add_nodes(made)
    made.add_argument(
        "user_script", help="the script (or with --module a module, with --no_python a command)"
    )
    made.add_argument("user_args", nargs=argparse.REMAINDER, help="the script's own arguments")
    return made


def _add_ranks(made: argparse.ArgumentParser) -> None:
    group = made.add_argument_group("which ranks")
    group.add_argument(
        "--num_gpus",
        "--num_accelerators",
        type=int,
        default=-1,
        metavar="N",
        help="ranks to start, one for each device; without devices they are CPU processes "
        "(default: all devices, or one CPU rank)",
    )
    group.add_argument("-i", "--include", default="", metavar="HOST:SLOTS", help="use these: localhost:0,2")
    group.add_argument("-e", "--exclude", default="", metavar="HOST:SLOTS", help="use all but these")
    group.add_argument("--bind_cores_to_rank", action="store_true", help="give each rank cores of its own")
    group.add_argument(
        "--bind_core_list", metavar="LIST", help="the cores to share out: 0-7,16 (default: all)"
    )


def _add_meeting(made: argparse.ArgumentParser) -> None:
    group = made.add_argument_group("where ranks meet")
    group.add_argument("--master_addr", default="", metavar="HOST", help="(default: 127.0.0.1)")
    group.add_argument("--master_port", type=int, metavar="PORT", help="(default: a free one)")


def _add_script(made: argparse.ArgumentParser) -> None:
    group = made.add_argument_group("how the script is run")
    group.add_argument("-m", "--module", action="store_true", help="run a module, as python -m does")
    group.add_argument("--no_python", action="store_true", help="run a command without Python")
    group.add_argument("--no_local_rank", action="store_true", help="do not add --local_rank=N")
    group.add_argument("--enable_each_rank_log", metavar="FOLDER", help="write each rank's output to a file")
    group.add_argument(
        "--save_pid", action="store_true", help="write this process's id to PID.ds in the temp folder"
    )
    group.add_argument(
        "--launcher_args", default="", metavar="ARGS", help="options for torch.distributed.run"
    )
    group.add_argument("--log_level", default="warning", choices=list(LEVELS), help="(default: warning)")


def _add_nodes(made: argparse.ArgumentParser) -> None:
    group = made.add_argument_group("several nodes (not built yet, except where one node is meant)")
    group.add_argument("-H", "--hostfile", default=DLTS_HOSTFILE, metavar="FILE", help="lines 'host slots=N'")
    group.add_argument("--num_nodes", type=int, default=-1, metavar="N")
    group.add_argument("--launcher", default="pdsh", help="how other nodes are reached; nothing to do on one")
    group.add_argument("--ssh_port", type=int)
    group.add_argument("--no_ssh_check", action="store_true")
    group.add_argument("--no_ssh", action="store_true")
    group.add_argument("--node_rank", type=int, default=-1, metavar="R")
    group.add_argument("--force_multi", action="store_true")
    group.add_argument("--elastic_training", action="store_true")
    group.add_argument("--min_elastic_nodes", type=int, default=-1)
    group.add_argument("--max_elastic_nodes", type=int, default=-1)
    group.add_argument("--autotuning", default="", choices=["", "tune", "run"])


def _refuse_unbuilt(options: argparse.Namespace) -> None:
    asked = {
        "--num_nodes": options.num_nodes if options.num_nodes > 1 else None,
        "--node_rank": options.node_rank if options.node_rank > 0 else None,
        "--no_ssh": options.no_ssh or None,
        "--force_multi": options.force_multi or None,
    }
    for option, value in asked.items():
        if value is not None:
            raise NotBuiltError(
                f"{option}: starting several nodes is not built yet, got {value}; leave it out"
            )
    if options.elastic_training or options.min_elastic_nodes > 0 or options.max_elastic_nodes > 0:
        raise NotBuiltError("--elastic_training: elastic training is not built yet; leave it out")
    if options.autotuning:
        raise NotBuiltError(
            f"--autotuning: autotuning is not built yet, got {options.autotuning}; leave it out"
        )


def _check(options: argparse.Namespace) -> None:
    if options.num_gpus != -1 and (options.include or options.exclude):
        raise ConfigError(
            "--num_gpus: expected to stand alone, got --include or --exclude too; give one of them"
        )
    if options.num_gpus == 0 or options.num_gpus < -1:
        raise ConfigError(f"--num_gpus: expected at least 1, got {options.num_gpus}")
    if options.num_nodes == 0 or options.num_nodes < -1:
        raise ConfigError(f"--num_nodes: expected 1, got {options.num_nodes}")
    if options.module and options.no_python:
        raise ConfigError("--module: expected to stand alone, got --no_python too; a module needs Python")
    if options.bind_core_list and not options.bind_cores_to_rank:
        raise ConfigError("--bind_core_list: expected --bind_cores_to_rank beside it; add that option")
    if options.no_python and shutil.which(options.user_script) is None:
        raise ConfigError(f"--no_python: expected a command, got {options.user_script!r}, which is not found")
    if not options.no_python and not options.module and not Path(options.user_script).exists():
        raise ConfigError(
            f"user_script: expected a Python file, got {options.user_script!r}, which does not exist"
        )
