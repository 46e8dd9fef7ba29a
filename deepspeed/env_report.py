"""ds_report: what this machine has, which optimised paths are used and why, and what a configuration means."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from rich.table import Table

from deepspeed.accelerator import get_accelerator
from deepspeed.common.commands import run
from deepspeed.common.processors import usable_processors
from deepspeed.common.tables import Rows, new_listing, show
from deepspeed.config import load_config
from deepspeed.config.report import render_config
from deepspeed.errors import ConfigError
from deepspeed.ops.adam import path_in_use
from deepspeed.ops.adam.compiled import WORTHWHILE
from deepspeed.version import __version__

OPTIONAL = {
    "matplotlib": "pictures of the loss",
    "tensorboard": "the tensorboard monitor",
    "wandb": "the wandb monitor",
    "comet_ml": "the comet monitor",
    "triton": "compiled kernels on GPUs",
    "mpi4py": "finding the first rank's address under mpirun",
    "transformers": "Hugging Face models and Trainer",
    "accelerate": "Hugging Face training loops",
    "peft": "adapters",
}
"""Import name of each package that something can use, and what."""

SPEAKING = ("DS_", "DEEPSPEED_", "OMP_", "MKL_", "CUDA_", "NCCL_", "GLOO_", "TORCH", "CXX", "MASTER_")
"""Beginnings of names of environment variables that change what happens."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the `ds_report` command; a configuration that cannot be used exits with 2 and one sentence."""
    run("ds_report", _command, args)


def _command(args: Sequence[str] | None) -> None:
    parser = argparse.ArgumentParser(
        "ds_report", description="Report on this machine, or on a configuration.", allow_abbrev=False
    )
    parser.add_argument("--config", metavar="FILE", help="show what this configuration means, value by value")
    parser.add_argument("--world", type=int, default=1, metavar="N", help="as seen by N ranks (default: 1)")
    options = parser.parse_args(args)
    for part in [effective(options.config, options.world)] if options.config else list(machine()):
        show(part)


def effective(source: str, world: int) -> Table:
    """Return the effective configuration on `world` ranks, what is not built yet included."""
    if world < 1:
        raise ConfigError(f"--world: expected at least 1, got {world}")
    return render_config(load_config(source, world_size=world, refuse_unbuilt=False))


def machine() -> Iterator[Table]:
    """Yield the report on this machine, table by table."""
    yield new_listing("Software", software())
    yield new_listing("Machine", hardware())
    yield new_listing("Compilers", compilers())
    yield new_listing("Optimised paths", paths())
    yield new_listing("Optional packages", packages())
    yield new_listing("Environment variables", variables(os.environ))


def software() -> Rows:
    """Versions, and where they are."""
    yield "deepspeed", f"{__version__} in {os.path.dirname(__file__)}"
    yield "Python", f"{platform.python_version()} in {sys.executable}"
    yield "torch", f"{torch.__version__} in {os.path.dirname(torch.__file__)}"
    yield "torch is built for", _built_for()
    yield "system", platform.platform()


def _built_for() -> str:
    if torch.version.cuda:
        return f"CUDA {torch.version.cuda}"
    return f"ROCm {torch.version.hip}" if torch.version.hip else "CPU"


def hardware() -> Rows:
    """Devices, cores, memory, and the communication backends between ranks."""
    accelerator = get_accelerator()
    yield "accelerator", "none: ranks are CPU processes" if accelerator.on_host else accelerator.kind
    yield from _devices()
    usable = len(usable_processors())
    cores, threads = psutil.cpu_count(logical=False), torch.get_num_threads()
    yield "cores", f"{cores}, {usable} processors usable; torch uses {threads} threads in a single process"
    yield "vector instructions", torch.backends.cpu.get_cpu_capability()
    memory = psutil.virtual_memory()
    yield "host memory", f"{_gib(memory.total)}, {_gib(memory.available)} free"
    if os.path.isdir("/dev/shm"):
        disk = shutil.disk_usage("/dev/shm")
        yield "shared memory", f"{_gib(disk.total)}, {_gib(disk.free)} free"
    yield "backends", ", ".join(name for name, there in _backends().items() if there) or "none"
    yield "bf16", _bf16()
    yield "fp16", "yes" if accelerator.is_fp16_supported() else "no"


def _devices() -> Rows:
    accelerator = get_accelerator()
    for index in range(0 if accelerator.on_host else accelerator.device_count()):
        found = accelerator.module.get_device_properties(index)
        yield accelerator.device_name(index), f"{found.name}, {_gib(found.total_memory)}"


def _backends() -> dict[str, bool]:
    return {
        name: bool(getattr(dist, f"is_{name}_available", bool)())
        for name in ("gloo", "nccl", "xccl", "mpi", "ucc")
    }


def _bf16() -> str:
    accelerator = get_accelerator()
    if not accelerator.is_bf16_supported():
        return "no"
    cpu = Path("/proc/cpuinfo")
    if (
        accelerator.on_host
        and cpu.exists()
        and not {"avx512_bf16", "amx_bf16"} & set(cpu.read_text().split())
    ):
        return "in software, slower than fp32: this processor has neither AVX512-BF16 nor AMX"
    return "yes"


def compilers() -> Rows:
    """What torch.compile would use."""
    for name in dict.fromkeys((os.environ.get("CXX", "g++"), "g++", "clang++")):
        yield name, shutil.which(name) or "not found"
    yield "triton", _version("triton")


def paths() -> Rows:
    """Which form of each optimised operation is used here, and why."""
    accelerator = get_accelerator()
    form, reason = path_in_use(accelerator.kind)
    size = f" from {WORTHWHILE:,} weights a rank on, chunked below" if form == "compiled" else ""
    yield "Adam, AdamW", f"{form}{size}: {reason}"
    if accelerator.on_host:
        yield "all-gather, reduce-scatter", "direct exchange over gloo: ranks are CPU processes"
    else:
        yield "all-gather, reduce-scatter", f"{accelerator.communication_backend_name()}'s own"


def packages() -> Rows:
    """Optional packages: version, and what they serve."""
    for name, use in OPTIONAL.items():
        yield name, f"{_version(name)} ({use})"


def variables(environ: Mapping[str, str]) -> Rows:
    """Environment variables that change how ranks start, compute or talk."""
    found = {name: value for name, value in sorted(environ.items()) if name.startswith(SPEAKING)}
    return found.items() if found else [("none", "that matters here is set")]


def _version(package: str) -> str:
    if importlib.util.find_spec(package) is None:
        return "not installed"
    names = importlib.metadata.packages_distributions().get(package, [package])
    try:
        return importlib.metadata.version(names[0])
    except importlib.metadata.PackageNotFoundError:
        return "installed"


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"


if __name__ == "__main__":
    main()
