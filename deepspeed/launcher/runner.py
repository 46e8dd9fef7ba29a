"""The `deepspeed` command: start ranks through torch's elastic agent, and say clearly how they ended."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from deepspeed.errors import ConfigError, DeepSpeedError, LaunchError
from deepspeed.launcher import bootstrap
from deepspeed.launcher.arguments import DLTS_HOSTFILE, parse_arguments
from deepspeed.launcher.cores import share_cores
from deepspeed.launcher.resources import fetch_hostfile, local_slots, parse_inclusion_exclusion

DEEPSPEED_ENVIRONMENT_NAME = ".deepspeed_env"
"""File of KEY=VALUE lines, in the working or home folder, that every rank gets as environment."""

EXPORT_ENVS = ["MLFLOW", "NCCL", "PYTHON", "MV2", "UCX"]
"""Prefixes of variables that belong to a job."""

GRACE_S = 5
"""Seconds that ranks have to end after SIGTERM, before SIGKILL."""

__all__ = [
    "DEEPSPEED_ENVIRONMENT_NAME",
    "DLTS_HOSTFILE",
    "EXPORT_ENVS",
    "fetch_hostfile",
    "main",
    "parse_inclusion_exclusion",
]


def main(args: Sequence[str] | None = None) -> None:
    """Run the `deepspeed` command and exit with the first failing rank's code."""
    try:
        code = launch(parse_arguments(args))
    except DeepSpeedError as error:
        print(f"deepspeed: {error}".replace("deepspeed: deepspeed:", "deepspeed:"), file=sys.stderr)
        code = 2
    sys.exit(code)


def launch(args: argparse.Namespace) -> int:
    """Start the ranks and wait for them; return the exit code."""
    _check_script(args)
    import torch  # after the arguments are known to be right: it takes seconds

    gpus = torch.cuda.device_count()
    slots = local_slots(gpus, args.num_gpus, args.include, args.exclude, fetch_hostfile(args.hostfile))
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, slots))
    _load_environment_file()
    with tempfile.TemporaryDirectory(prefix="deepspeed-launch-") as pids:
        _set_environment(args, len(slots), pids)
        try:
            return _run_agent(args, len(slots), pids)
        finally:
            _end_leftovers(Path(pids))


def _check_script(args: argparse.Namespace) -> None:
    if not args.module and not args.no_python and not os.path.isfile(args.user_script):
        raise ConfigError(f"script: expected a file, got {args.user_script!r}; -m starts a module")


def _load_environment_file() -> None:
    for folder in (Path.home(), Path.cwd()):
        file = folder / DEEPSPEED_ENVIRONMENT_NAME
        if file.is_file():
            for line in file.read_text().splitlines():
                name, equals, value = line.strip().partition("=")
                if equals and not name.startswith("#"):
                    os.environ[name] = value


def _set_environment(args: argparse.Namespace, ranks: int, pids: str) -> None:
    kind = "program" if args.no_python else "module" if args.module else "script"
    shares = share_cores(ranks, args.bind_core_list) if args.bind_cores_to_rank else []
    threads = len(shares[0]) if shares else max(1, (os.cpu_count() or 1) // ranks)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(GRACE_S))
    os.environ[bootstrap.KIND] = kind
    os.environ[bootstrap.LAUNCHER_PID] = str(os.getpid())
    os.environ[bootstrap.PIDS] = pids
    os.environ[bootstrap.CORES] = ";".join(",".join(map(str, share)) for share in shares)
    os.environ[bootstrap.LOCAL_RANK_ARGUMENT] = "" if args.no_local_rank or args.no_python else "1"


def _run_agent(args: argparse.Namespace, ranks: int, pids: str) -> int:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    address = args.master_addr or "127.0.0.1"
    logs = DefaultLogsSpecs(log_dir=args.enable_each_rank_log or os.path.join(pids, "logs"))
    if args.enable_each_rank_log:
        os.makedirs(args.enable_each_rank_log, exist_ok=True)
        logs = DefaultLogsSpecs(log_dir=args.enable_each_rank_log, tee=Std.ALL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id="deepspeed",
        rdzv_backend="static",
        rdzv_endpoint=f"{address}:{_port(address, args.master_port)}",
        rdzv_configs={"rank": 0, "timeout": 900},
        max_restarts=0,
        monitor_interval=0.1,
        logs_specs=logs,
        local_addr=address,
    )
    command = [sys.executable, "-u", bootstrap.__file__, args.user_script, *args.user_args]
    try:
        elastic_launch(config, command[0])(*command[1:])
    except ChildFailedError as error:
        return _report(error, ranks)
    except SignalException as error:
        print(f"deepspeed: ended by {error.sigval.name}; all ranks were ended", file=sys.stderr)
        return 128 + int(error.sigval)
    except KeyboardInterrupt:
        return 128 + int(signal.SIGINT)
    return 0


def _port(address: str, wanted: int) -> int:
    """Return a free port on this machine, or the wanted one if it is free."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", wanted))
        except OSError as error:
            raise LaunchError(
                f"--master_port: port {wanted} cannot be used ({error.strerror}); leave it out to get a free one"
            ) from error
        return int(probe.getsockname()[1])


def _report(error: object, ranks: int) -> int:
    """Print the first failing rank's end, its traceback last; return its exit code."""
    rank, failure = error.get_first_failure()  # type: ignore[attr-defined]
    code = failure.exitcode
    sys.stdout.flush()
    if code < 0:
        print(f"deepspeed: rank {rank} of {ranks} {_signal_in_words(-code)}", file=sys.stderr)
        return 128 - code
    print(f"deepspeed: rank {rank} of {ranks} failed first, with exit code {code}", file=sys.stderr)
    if isinstance(failure.message, str) and failure.message.startswith("Traceback"):
        print(failure.message.rstrip(), file=sys.stderr)
    return int(code)


def _signal_in_words(number: int) -> str:
    name = signal.Signals(number).name
    hints = {
        signal.SIGKILL: ": probably out of host memory",
        signal.SIGSEGV: ": it touched memory that is not its own",
        signal.SIGABRT: ": a library gave up, see its message above",
        signal.SIGBUS: ": probably out of shared memory",
    }
    return f"was killed by {name}{hints.get(signal.Signals(number), '')}"


def _end_leftovers(pids: Path) -> None:
    """Kill what is left of each rank's process group: its own children, should they ignore SIGTERM."""
    for entry in pids.iterdir():
        if entry.name.isdigit():
            try:
                os.killpg(int(entry.name), signal.SIGKILL)
            except ProcessLookupError:
                continue


if __name__ == "__main__":
    main()
