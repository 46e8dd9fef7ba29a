"""The `deepspeed` command: start a script on several ranks of this machine."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from deepspeed.common.logging import logger, set_log_level
from deepspeed.errors import ConfigError, DeepSpeedError
from deepspeed.launcher.cores import listed_cores, share, usable_cores
from deepspeed.launcher.hosts import (
    DLTS_HOSTFILE,
    fetch_hostfile,
    parse_inclusion_exclusion,
    parse_resource_filter,
    read_text,
)
from deepspeed.launcher.options import parse
from deepspeed.launcher.rank import Task

EXPORT_ENVS = ["MLFLOW", "NCCL", "PYTHON", "MV2", "UCX"]
"""Beginnings of the names of variables that other nodes get; on one node every variable is inherited."""

DEEPSPEED_ENVIRONMENT_NAME = ".deepspeed_env"
"""File of KEY=VALUE lines, in this or the home folder: variables that ranks get unless they are set already."""

GRACE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
GRACE_SECONDS = "5"
AGENT_PATIENCE = 15

__all__ = [
    "DEEPSPEED_ENVIRONMENT_NAME",
    "DLTS_HOSTFILE",
    "EXPORT_ENVS",
    "fetch_hostfile",
    "main",
    "parse_inclusion_exclusion",
    "parse_resource_filter",
]


def main(args: Sequence[str] | None = None) -> None:
    """Run the command and exit with the code of the first rank that failed, or 0.

    Wrong options exit with 2 and one sentence.
    """
    try:
        code = launch(parse(args))
    except KeyboardInterrupt:
        code = 130
    except DeepSpeedError as error:
        print(f"deepspeed: {error}", file=sys.stderr)
        code = 2 if isinstance(error, ConfigError) else 1
    sys.exit(code)


def launch(options: argparse.Namespace) -> int:
    """Start what the options ask for, wait for its end and return the exit code."""
    # Here, because torch takes a second to load and a mistyped option should not wait for it.
    from deepspeed.launcher import job, slots

    set_log_level(options.log_level)
    if options.master_port is not None:
        job.check_port(options.master_port)
    if options.master_addr:
        job.check_address(options.master_addr)
    chosen = slots.choose_slots(options)
    cores = listed_cores(options.bind_core_list) if options.bind_core_list else usable_cores()
    shares = share(cores, chosen.ranks) if options.bind_cores_to_rank else []
    _read_variables()
    os.environ.update(chosen.environment)
    os.environ.update(LOCAL_SIZE=str(chosen.ranks), CROSS_RANK="0", CROSS_SIZE="1")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(cores) // chosen.ranks)))
    task = Task(
        launcher=os.getpid(),
        kind="command" if options.no_python else "module" if options.module else "script",
        local_rank_argument=not options.no_local_rank,
        grace=_grace(),
        log=_log_pattern(options.enable_each_rank_log),
        cores=tuple(tuple(cpu for core in each for cpu in core) for each in shares),
    )
    command = ["-m", "deepspeed.launcher.rank", task.encode(), options.user_script, *options.user_args]
    started = job.Job(
        ranks=chosen.ranks,
        command=command,
        address=options.master_addr or job.LOCAL_ADDRESS,
        port=options.master_port or 0,
        extra=options.launcher_args,
    )
    logger.info("starting %s; threads a rank: %s", started, os.environ["OMP_NUM_THREADS"])
    with _pid_file(options.save_pid):
        return job.run(started)


def _grace() -> int:
    """Return the seconds ranks get to end by themselves.

    Torch's agent, which reads the same variable, gets more, so that the guards are through before it kills them.
    """
    text = os.environ.get(GRACE, GRACE_SECONDS)
    if not text.isdecimal():
        raise ConfigError(f"{GRACE}: expected whole seconds, got {text!r}")
    os.environ[GRACE] = str(int(text) + AGENT_PATIENCE)
    return int(text)


def _read_variables() -> None:
    for folder in (Path.cwd(), Path.home()):
        path = folder / DEEPSPEED_ENVIRONMENT_NAME
        for line in read_text(path).splitlines() if path.is_file() else ():
            name, equals, value = line.strip().partition("=")
            if equals and not name.startswith("#"):
                os.environ.setdefault(name, value)


def _log_pattern(folder: str | None) -> str:
    """Return the name of each rank's log, with {rank} to be filled in; the folder is made."""
    if not folder:
        return ""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--enable_each_rank_log: expected a folder, got {folder!r}, which cannot be made ({error.strerror})"
        ) from None
    name = f"{time.strftime('%Y%m%d%H%M%S')}_rank{{rank}}.log"
    return str(Path(folder.replace("{", "{{").replace("}", "}}")).absolute() / name)


@contextmanager
def _pid_file(wanted: bool) -> Iterator[None]:
    """Keep this process's id in a file named after it while the job runs."""
    path = Path(tempfile.gettempdir()) / f"{os.getpid()}.ds"
    if wanted:
        path.write_text(str(os.getpid()))
    try:
        yield
    finally:
        if wanted:
            path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
