"""What runs first in every rank: tie its life to the launcher's, bind cores, run the script.

This file is started by its path and imports neither torch nor this package, so that it costs nothing and the
script finds the interpreter as it would find it without a launcher.
"""

from __future__ import annotations

import ctypes
import json
import os
import runpy
import signal
import sys
import time
import traceback

PR_SET_PDEATHSIG = 1
KIND, LAUNCHER_PID, PIDS, CORES, LOCAL_RANK_ARGUMENT = (
    f"DEEPSPEED_LAUNCH_{name}" for name in ("KIND", "PARENT", "PIDS", "CORES", "LOCAL_RANK_ARGUMENT")
)


def main() -> None:
    """Run ``sys.argv[1:]`` as the environment says: a script, a module, or a program."""
    settings = {
        name: os.environ.pop(name, "") for name in (KIND, LAUNCHER_PID, PIDS, CORES, LOCAL_RANK_ARGUMENT)
    }
    die_with_launcher(int(settings[LAUNCHER_PID]))
    with open(os.path.join(settings[PIDS], str(os.getpid())), "w"):
        pass
    local_rank = os.environ["LOCAL_RANK"]
    os.environ["LOCAL_SIZE"] = os.environ["LOCAL_WORLD_SIZE"]
    os.environ.update(CROSS_RANK="0", CROSS_SIZE="1")
    if settings[CORES] and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(
            0, [int(core) for core in settings[CORES].split(";")[int(local_rank)].split(",")]
        )
    target, arguments = sys.argv[1], sys.argv[2:]
    if settings[LOCAL_RANK_ARGUMENT]:
        arguments = [f"--local_rank={local_rank}", *arguments]
    if settings[KIND] == "program":
        os.execvp(target, [target, *arguments])
    run(settings[KIND], target, arguments)


def die_with_launcher(launcher: int) -> None:
    """Ask the kernel to end this process when the launcher is gone, however it went (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != launcher:
            os._exit(1)


def run(kind: str, target: str, arguments: list[str]) -> None:
    """Run a script or module as ``__main__``; leave its traceback where the launcher reads it."""
    sys.argv = [target, *arguments]
    try:
        if kind == "module":
            sys.path[0] = os.getcwd()
            runpy.run_module(target, run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = os.path.dirname(os.path.abspath(target))
            runpy.run_path(target, run_name="__main__")
    except SystemExit:
        raise
    except BaseException as error:
        report(error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def report(error: BaseException) -> None:
    """Write the script's part of the traceback to the file that torch's agent named for this rank."""
    own = (__file__, runpy.__file__, "<frozen runpy>")
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename not in own]
    lines = ["Traceback (most recent call last):\n", *traceback.format_list(frames)]
    text = "".join([*lines, *traceback.format_exception_only(type(error), error)])
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None:
        sys.stderr.write(text)
        return
    with open(path, "w") as file:
        json.dump({"message": text, "timestamp": str(int(time.time()))}, file)


if __name__ == "__main__":
    main()
