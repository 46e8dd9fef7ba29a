"""Command-line arguments of the launcher, under the original's names."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from deepspeed.errors import NotBuiltError

DLTS_HOSTFILE = "/job/hostfile"


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the `deepspeed` command."""
    parser = argparse.ArgumentParser(
        "deepspeed",
        description="Start a training script on every rank of this machine.",
        epilog="Everything after the script belongs to the script.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--num_gpus",
        "--num_accelerators",
        dest="num_gpus",
        type=int,
        default=-1,
        help="ranks to start; without a GPU, processes on the CPU (default: every GPU, else 1)",
    )
    add("-i", "--include", default="", help='devices to use, as "localhost:0,2"')
    add("-e", "--exclude", default="", help='devices not to use, as "localhost:1"')
    add("--master_addr", default="", help="address of the first rank (default: this machine)")
    add("--master_port", type=int, default=0, help="port of the first rank (default: a free one)")
    add("-m", "--module", action="store_true", help="the script is a module's name, as for python -m")
    add("--no_python", action="store_true", help="run the script itself, not Python on it")
    add("--no_local_rank", action="store_true", help="do not pass --local_rank=N to the script")
    add(
        "--enable_each_rank_log",
        metavar="DIR",
        default=None,
        help="also write each rank's output to files here",
    )
    add("--bind_cores_to_rank", action="store_true", help="give each rank its own share of the cores")
    add("--bind_core_list", default=None, help='cores to share out, as "0-7,16-23"')
    add("--launcher_args", default="", help="arguments of the multi-node launcher")
    add("--log_level", default="warning", help="level of the launcher's own log")
    add("--save_pid", action="store_true", help=argparse.SUPPRESS)
    for flag, default in (("-H/--hostfile", DLTS_HOSTFILE), ("--launcher", "pdsh"), ("--ssh_port", None)):
        add(*flag.split("/"), default=default, help="for several machines")
    add("--num_nodes", type=int, default=-1, help="for several machines")
    add("--node_rank", type=int, default=-1, help="for several machines")
    add("--no_ssh", action="store_true", help="for several machines")
    add("--no_ssh_check", action="store_true", help="for several machines")
    add("--force_multi", action="store_true", help="for several machines")
    add("--elastic_training", action="store_true", help="for jobs that change size")
    add("--min_elastic_nodes", type=int, default=-1, help="for jobs that change size")
    add("--max_elastic_nodes", type=int, default=-1, help="for jobs that change size")
    add("--autotuning", choices=("tune", "run"), default="", help="search for a configuration")
    add("user_script", help="script to start")
    add("user_args", nargs=argparse.REMAINDER, help="its arguments")
    return parser  # fmt: skip


def parse_arguments(args: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the launcher's arguments.

    Raises:
        NotBuiltError: they ask for several machines, elasticity or autotuning.
    """
    parsed = make_parser().parse_args(args)
    several = parsed.num_nodes > 1 or parsed.force_multi or parsed.no_ssh or parsed.node_rank > 0
    for asked, name in (
        (several, "several machines"),
        (parsed.elastic_training, "--elastic_training"),
        (parsed.autotuning, "--autotuning"),
    ):
        if asked:
            raise NotBuiltError(
                f"deepspeed: {name}: not built yet; start the ranks of one machine, or use torchrun"
            )
    return parsed
