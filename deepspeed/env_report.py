"""ds_report: what this machine has, which optimised paths are used and why, and what a configuration means."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Iterable, Sequence

import psutil
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from deepspeed.accelerator import get_accelerator
from deepspeed.config import load_config
from deepspeed.config.report import render_config
from deepspeed.errors import DeepSpeedError
from deepspeed.ops.adam import path_in_use
from deepspeed.version import __version__

OPTIONAL = {
    "transformers": "Hugging Face models and Trainer",
    "accelerate": "Hugging Face launcher and loop",
    "peft": "adapters",
    "tensorboard": "the tensorboard monitor",
    "wandb": "the wandb monitor",
    "comet_ml": "the comet monitor",
    "matplotlib": "pictures",
    "mpi4py": "address discovery under mpirun",
    "triton": "compiled kernels on GPUs",
}

Rows = Iterable[tuple[str, str]]


def main(args: Sequence[str] | None = None) -> None:
    """Run the `ds_report` command."""
    parser = argparse.ArgumentParser(
        "ds_report", description="Report on this machine, or on a configuration."
    )
    parser.add_argument("--config", metavar="FILE", help="show what this configuration means, value by value")
    parser.add_argument("--world", type=int, default=1, metavar="N", help="as seen by this many ranks")
    options = parser.parse_args(args)
    console = Console(width=None if sys.stdout.isatty() else 140)
    if options.config is None:
        for title, rows in sections():
            console.print(_table(title, rows))
        return
    try:
        config = load_config(options.config, world_size=options.world, refuse_unbuilt=False)
    except DeepSpeedError as error:
        print(f"ds_report: {error}", file=sys.stderr)
        sys.exit(2)
    console.print(render_config(config))


def sections() -> list[tuple[str, Rows]]:
    """Return the report as (title, rows) pairs."""
    return [
        ("Software", software()),
        ("Hardware", hardware()),
        ("Optimised paths", paths()),
        ("Optional packages", packages()),
    ]


def software() -> Rows:
    """Versions, and where they are."""
    yield "deepspeed", f"{__version__} in {os.path.dirname(__file__)}"
    yield "Python", f"{platform.python_version()} in {sys.executable}"
    yield "torch", f"{torch.__version__} in {os.path.dirname(torch.__file__)}"
    yield "CUDA of torch", torch.version.cuda or "none"
    yield "platform", platform.platform()


def hardware() -> Rows:
    """Devices, cores, memory and the communication backends between them."""
    accelerator = get_accelerator()
    yield "accelerator", accelerator.device_name()
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    yield "GPUs", ", ".join(gpus) or "none"
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield "cores", f"{usable} usable, torch uses {torch.get_num_threads()} threads"
    memory = psutil.virtual_memory()
    yield "memory", f"{memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} GiB free"
    if os.path.isdir("/dev/shm"):
        yield "shared memory", f"{psutil.disk_usage('/dev/shm').total / 2**30:.1f} GiB"
    backends = {
        "gloo": dist.is_gloo_available(),
        "nccl": dist.is_nccl_available(),
        "mpi": dist.is_mpi_available(),
    }
    yield "backends", ", ".join(name for name, there in backends.items() if there) or "none"
    yield "bf16", "yes" if accelerator.is_bf16_supported() else "no"
    yield "fp16", "yes" if accelerator.is_fp16_supported() else "no"


def paths() -> Rows:
    """Which form of each optimised operation this machine uses, and why."""
    kind = torch.device(get_accelerator().current_device_name()).type
    name, reason = path_in_use(kind)
    yield "Adam", f"{name}: {reason}"
    if kind == "cpu":
        yield "all-gather, reduce-scatter", "direct exchange: ranks on CPU over gloo"
    else:
        yield "all-gather, reduce-scatter", get_accelerator().communication_backend_name()


def packages() -> Rows:
    """Optional packages: version, or what is missing without them."""
    for name, use in OPTIONAL.items():
        if importlib.util.find_spec(name) is None:
            yield name, f"not installed ({use})"
        else:
            yield name, _version(name)


def _version(package: str) -> str:
    names = importlib.metadata.packages_distributions().get(package, [package])
    try:
        return importlib.metadata.version(names[0])
    except importlib.metadata.PackageNotFoundError:
        return "installed"


def _table(title: str, rows: Rows) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, min_width=60)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    return table


if __name__ == "__main__":
    main()
