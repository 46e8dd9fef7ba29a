"""Starting torch.distributed: under any launcher, or without one as a single rank."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from deepspeed.accelerator import get_accelerator
from deepspeed.comm.backend import NAME as SHM
from deepspeed.comm.backend import register
from deepspeed.comm.environment import (
    Place,
    current_place,
    fair_threads,
    from_mpi,
    given_place,
    number,
)
from deepspeed.comm.log import configure
from deepspeed.common.logging import announce, log_dist
from deepspeed.common.processors import usable_processors
from deepspeed.errors import CommunicationError, ConfigError, UsageError

DEFAULT_PORT = 29500
DEFAULT_TIMEOUT_MINUTES = 30


def init_distributed(
    dist_backend: str | None = None,
    auto_mpi_discovery: bool = True,
    distributed_port: int = DEFAULT_PORT,
    verbose: bool = True,
    timeout: timedelta | None = None,
    init_method: str | None = None,
    dist_init_required: bool | None = None,
    config: Any = None,
    rank: int = -1,
    world_size: int = -1,
) -> None:
    """Start torch.distributed, or adopt it where it is already running.

    The ranks come from `rank` and `world_size`, else from the launcher's environment, else from MPI's (unless
    `auto_mpi_discovery` is off), else this process is the only rank and uses no port. `dist_backend` None
    takes what suits the device; ``shm`` is gloo with torch's own functions through shared memory, too (note [A
    backend of torch's]). `timeout` None takes DEEPSPEED_TIMEOUT (minutes), else 30 minutes. `config`
    may hold a ``comms_logger`` section. Raises CommunicationError when the ranks cannot meet, ConfigError
    for a backend that torch does not have or that allows no other beside it, and UsageError when
    `dist_init_required` is False and nothing is running.
    """
    if config is not None:
        configure(config)
    if dist.is_initialized():
        return
    if dist_init_required is False:
        raise UsageError(
            "dist_init_required: expected True or None while torch.distributed is not running, got False; "
            "call torch.distributed.init_process_group first, or let deepspeed start it"
        )
    backend = _checked_backend(dist_backend)
    if rank >= 0 and world_size > 0:
        place = given_place(rank, world_size, distributed_port, os.environ)
    else:
        place = current_place(distributed_port, mpi=auto_mpi_discovery)
    _start(backend, place, timeout or default_timeout(), init_method)
    _share_processors()
    if verbose:
        log_dist(f"torch.distributed: {place.world_size} ranks, backend {backend}", ranks=[0])


def mpi_discovery(distributed_port: int = DEFAULT_PORT, verbose: bool = True) -> None:
    """Read the ranks an MPI launcher assigned and export them under torchrun's names."""
    place = from_mpi(os.environ, distributed_port)
    if place is None:
        raise CommunicationError(
            "mpi_discovery: expected to run under mpirun or another MPI launcher, got none of its variables; "
            "start the script with mpirun, the deepspeed command or torchrun"
        )
    place.export(os.environ)
    if verbose:
        log_dist(
            f"MPI: rank {place.rank} of {place.world_size}, master {place.master_addr}:{place.master_port}",
            ranks=[0],
        )


def default_timeout() -> timedelta:
    """Return how long a collective may take: DEEPSPEED_TIMEOUT minutes, else 30."""
    return timedelta(minutes=number(os.environ, "DEEPSPEED_TIMEOUT", DEFAULT_TIMEOUT_MINUTES))


def default_backend() -> str:
    """Return the backend that suits this machine: gloo for CPU tensors, and the device's own beside it."""
    accelerator = get_accelerator()
    name = accelerator.communication_backend_name()
    kind = accelerator.device_name()
    return name if kind == "cpu" else f"cpu:gloo,{kind}:{name}"


def _checked_backend(asked: str | None) -> str:
    backend = asked or default_backend()
    names = [part.rpartition(":")[2].strip().lower() for part in backend.split(",")]
    if SHM in names:
        register()
    for name in names:
        known = name in dist.Backend.backend_list and name != "undefined"
        if not known or not dist.is_backend_available(name):
            raise ConfigError(
                f"dist_backend: expected one that this torch has ({', '.join(_available())}), got "
                f"{backend!r}; leave it out to take the device's own"
            )
        if name == SHM and "," in backend:
            raise ConfigError(
                f"dist_backend: expected {SHM} alone, because torch puts no other backend beside it, got {backend!r}"
            )
    return backend


def _available() -> list[str]:
    return [
        name
        for name in dist.Backend.backend_list
        if name not in ("undefined", "fake") and dist.is_backend_available(name)
    ]


def _start(backend: str, place: Place, timeout: timedelta, init_method: str | None) -> None:
    where: dict[str, Any]
    if init_method is not None:
        where = {"init_method": init_method}
    elif place.world_size == 1:
        # One rank needs no port, so none can be taken.
        where = {"store": dist.HashStore()}  # type: ignore[attr-defined]
    elif place.master_addr:
        where = {"init_method": _rendezvous(place)}
    else:
        raise CommunicationError(
            "MASTER_ADDR: expected the address of rank 0's machine, got nothing; "
            "start the script with the deepspeed command or torchrun, or set it"
        )
    try:
        dist.init_process_group(
            backend, rank=place.rank, world_size=place.world_size, timeout=timeout, **where
        )
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise _explained(error, place, init_method) from error


def _share_processors() -> None:
    """Take no more threads than this rank's share of the host, unless the user has chosen."""
    before = torch.get_num_threads()
    own, host = len(usable_processors()), len(usable_processors(os.getppid()))
    threads = fair_threads(os.environ, before, own, host)
    if threads < before:
        torch.set_num_threads(threads)
        announce(
            f"threads of a rank: {threads} instead of {before}, because its host has other ranks; "
            "set OMP_NUM_THREADS to choose"
        )


def _rendezvous(place: Place) -> str:
    """Return the URL the ranks meet at; torchrun's own store is only reached through ``env://``."""
    if dist.is_torchelastic_launched():
        return "env://"
    address = f"[{place.master_addr}]" if ":" in place.master_addr else place.master_addr
    return f"tcp://{address}:{place.master_port}"


def _explained(error: Exception, place: Place, init_method: str | None) -> CommunicationError:
    where = init_method or f"{place.master_addr}:{place.master_port}"
    if "EADDRINUSE" in str(error) or "in use" in str(error):
        return CommunicationError(
            f"master_port: expected a free port, got {place.master_port}, which another process is using; "
            "choose another with --master_port or distributed_port"
        )
    return CommunicationError(
        f"rank {place.rank} of {place.world_size} could not meet the others at {where}: "
        f"{str(error).splitlines()[0]}; check that rank 0 runs there and that every rank was started"
    )
