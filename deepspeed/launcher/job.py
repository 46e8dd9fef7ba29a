"""The ranks of one job, started and watched by torch.distributed.run."""

from __future__ import annotations

import logging
import shlex
import signal
import socket
import sys
import tempfile
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from torch.distributed import DistNetworkError
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError

from deepspeed.errors import ConfigError, LaunchError
from deepspeed.launcher.failure import report

LOCAL_ADDRESS = "127.0.0.1"


@dataclass(frozen=True)
class Job:
    """What to start."""

    ranks: int
    command: Sequence[str]
    """The arguments of this Python for each rank."""
    address: str = LOCAL_ADDRESS
    port: int = 0
    """0 takes a free port."""
    extra: str = ""
    """More options for torch.distributed.run."""


def run(job: Job) -> int:
    """Run the job to its end and return its exit code; print the first failure last."""
    _quieten()
    with tempfile.TemporaryDirectory(prefix="deepspeed_") as folder:
        try:
            torchrun.run(_arguments(job, folder))
        except ChildFailedError as failed:
            told = report(failed.failures)
            print(f"\n{told.text}", file=sys.stderr, flush=True)
            return told.code
        except SignalException as stopped:
            number = signal.Signals(stopped.sigval)
            print(f"deepspeed: stopped by {number.name}; all ranks have ended", file=sys.stderr, flush=True)
            return 128 + number
        except (RendezvousError, DistNetworkError) as error:
            raise LaunchError(
                f"--master_addr, --master_port: ranks cannot meet at {job.address}: {error}"
            ) from error
    return 0


def _arguments(job: Job, folder: str) -> object:
    """Return torch.distributed.run's own options for the job."""
    arguments = torchrun.parse_args(
        [
            "--nnodes=1",
            f"--nproc-per-node={job.ranks}",
            *_meeting(job),
            f"--rdzv-id={uuid.uuid4().hex}",
            f"--local-addr={job.address}",
            f"--log-dir={folder}",
            *_words(job.extra),
            "--no-python",
            sys.executable,
        ]
    )
    # Not parsed with the rest: a "--" of the user's would be lost. "$" is doubled because the agent replaces
    # names of its own in arguments.
    arguments.training_script_args = [part.replace("$", "$$") for part in job.command]
    return arguments


def _words(text: str) -> list[str]:
    """Split --launcher_args as a shell would."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ConfigError(
            f"--launcher_args: expected options in balanced quotes, got {text!r} ({error})"
        ) from None


def _meeting(job: Job) -> list[str]:
    """Return the options for where ranks meet: a named port, or one that the first store's server gets."""
    if job.port:
        return ["--rdzv-backend=static", f"--master-addr={job.address}", f"--master-port={job.port}"]
    return ["--rdzv-backend=c10d", f"--rdzv-endpoint={job.address}:0", "--rdzv-conf=is_host=1"]


def check_port(port: int) -> None:
    """Raise ConfigError unless a server could listen on `port`."""
    if not 0 < port < 65536:
        raise ConfigError(f"--master_port: expected 1 to 65535, got {port}")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise ConfigError(
                f"--master_port: expected a free port, got {port} ({error.strerror}); "
                "name another, or leave the option out and a free one is taken"
            ) from None


def check_address(address: str) -> None:
    """Raise ConfigError unless `address` can be resolved."""
    try:
        socket.getaddrinfo(address, None)
    except OSError as error:
        raise ConfigError(
            f"--master_addr: expected a name or address of this machine, got {address!r} ({error})"
        ) from None


def _quieten() -> None:
    """Keep the agent's own reports of a failure back; ours comes last."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("torch.distributed", "torchelastic")):
            logging.getLogger(name).setLevel(logging.CRITICAL)
