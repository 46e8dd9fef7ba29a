"""What the launcher left in the environment: which rank this process is, and where rank 0 listens.

torchrun, deepspeed    RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT
OpenMPI                OMPI_COMM_WORLD_RANK, _SIZE, _LOCAL_RANK   (AzureML and SageMaker start with it)
MPICH, Intel, Slurm    PMI_RANK, PMI_SIZE, MPI_LOCALRANKID
MVAPICH                MV2_COMM_WORLD_RANK, _SIZE, _LOCAL_RANK
AzureML                AZ_BATCH_MASTER_NODE or AZ_BATCHAI_MPI_MASTER_NODE: the address of rank 0
SageMaker              SM_HOSTS: the host names, the first one runs rank 0
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from deepspeed.errors import CommunicationError

LOCALHOST = "127.0.0.1"
MPI_NAMES = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
)

HOST_SIZES = (
    "LOCAL_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "MV2_COMM_WORLD_LOCAL_SIZE",
    "MPI_LOCALNRANKS",
)
"""How many ranks the launcher has started on this host."""


@dataclass(frozen=True)
class Place:
    """One process's place among the ranks."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    master_addr: str = ""
    master_port: int = 0

    def export(self, environ: MutableMapping[str, str]) -> None:
        """Write the place under torchrun's names, for scripts that read them."""
        environ["RANK"] = str(self.rank)
        environ["WORLD_SIZE"] = str(self.world_size)
        environ["LOCAL_RANK"] = str(self.local_rank)
        environ["MASTER_ADDR"] = self.master_addr
        environ["MASTER_PORT"] = str(self.master_port)


def from_torchrun(environ: Mapping[str, str], default_port: int) -> Place | None:
    """Read torchrun's variables; None when neither a rank nor a world size is set."""
    if "RANK" not in environ and "WORLD_SIZE" not in environ:
        return None
    world_size = number(environ, "WORLD_SIZE", None if "RANK" in environ else 1)
    rank = number(environ, "RANK", 0 if world_size == 1 else None)
    if rank >= world_size:
        raise CommunicationError(f"RANK: expected less than WORLD_SIZE={world_size}, got {rank}")
    return given_place(rank, world_size, default_port, environ)


def given_place(rank: int, world_size: int, default_port: int, environ: Mapping[str, str]) -> Place:
    """Return the place of a known rank; where rank 0 listens is read from torchrun's variables."""
    return Place(
        rank,
        world_size,
        number(environ, "LOCAL_RANK", 0),
        environ.get("MASTER_ADDR", ""),
        number(environ, "MASTER_PORT", default_port),
    )


def from_mpi(environ: Mapping[str, str], default_port: int) -> Place | None:
    """Read what an MPI launcher set, in whichever cloud; None when no MPI launcher started this process."""
    for rank_name, size_name, local_name in MPI_NAMES:
        if rank_name in environ and size_name in environ:
            rank, world_size = number(environ, rank_name), number(environ, size_name)
            master, port = _mpi_master(environ, rank, default_port)
            return Place(rank, world_size, number(environ, local_name, 0), master, port)
    return None


def _mpi_master(environ: Mapping[str, str], rank: int, default_port: int) -> tuple[str, int]:
    """Find where rank 0 listens: what is set, the cloud's variables, MPI itself, then this machine."""
    port = number(environ, "MASTER_PORT", default_port)
    if environ.get("MASTER_ADDR"):
        return environ["MASTER_ADDR"], port
    batch = environ.get("AZ_BATCH_MASTER_NODE")  # host:port
    if batch:
        host, _, batch_port = batch.partition(":")
        return host, port if "MASTER_PORT" in environ or not batch_port else int(batch_port)
    if environ.get("AZ_BATCHAI_MPI_MASTER_NODE"):
        return environ["AZ_BATCHAI_MPI_MASTER_NODE"], port
    if environ.get("SM_HOSTS"):
        return str(sorted(json.loads(environ["SM_HOSTS"]))[0]), port
    return _address_by_mpi(rank) or LOCALHOST, port


def _address_by_mpi(rank: int) -> str | None:
    """Ask rank 0 for its address through mpi4py, or return None where that is not installed."""
    try:
        from mpi4py import MPI
    except ImportError:
        return None
    address: Any = _own_address() if rank == 0 else None
    return str(MPI.COMM_WORLD.bcast(address, root=0))


def _own_address() -> str:
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return LOCALHOST


def current_place(
    default_port: int, *, mpi: bool = True, environ: MutableMapping[str, str] | None = None
) -> Place:
    """Return this process's place: from the launcher's variables, from MPI's, else the only rank.

    A place found through MPI is also exported under torchrun's names; a lone rank writes nothing, so that
    a launcher started later from this process is not misled.
    """
    environ = os.environ if environ is None else environ
    place = from_torchrun(environ, default_port)
    if place is None and mpi:
        place = from_mpi(environ, default_port)
        if place is not None:
            place.export(environ)
    return place or Place()


def fair_threads(environ: Mapping[str, str], threads: int, own: int, host: int) -> int:
    """Return how many threads a rank should use, so that the ranks of its host do not crowd each other out.

    Args:
        environ: where the launcher says how many ranks share the host, and the user how many threads each has.
        threads: what the rank uses now. torch begins with one for each processor or for each core of two; another
            number is the user's choice and stays.
        own: processors that this process may run on.
        host: processors that the launcher may run on, which all its ranks share.
    """
    ranks = max(number(environ, name, 1) for name in HOST_SIZES)
    chosen = "OMP_NUM_THREADS" in environ or "MKL_NUM_THREADS" in environ or threads not in (own, own // 2)
    return threads if chosen or threads * ranks <= host else max(1, host // ranks)


def number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    """Read an integer variable; without a default it must be set."""
    text = environ.get(name, "").strip()
    if not text and default is not None:
        return default
    try:
        return int(text)
    except ValueError:
        raise CommunicationError(
            f"{name}: expected an integer, got {text!r}; start the script with the deepspeed command or "
            "torchrun"
        ) from None
