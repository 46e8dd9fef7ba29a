"""The user's program inside a rank: run as Python would run it, and its failure written down."""

from __future__ import annotations

import atexit
import builtins
import faulthandler
import importlib.machinery
import io
import os
import runpy
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, TracebackType

from deepspeed.launcher import record

FOLDER = os.path.dirname(__file__)


def run_script(path: str, arguments: Sequence[str]) -> None:
    """Run a file as ``python path arguments`` would; its module stays ``__main__`` until the process ends."""
    sys.argv = [path, *arguments]
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = os.path.dirname(os.path.realpath(path))
    if not os.path.isfile(path):  # a folder or an archive with a __main__.py
        runpy.run_path(path, run_name="__main__")
        return
    main = ModuleType("__main__")
    main.__file__ = path
    main.__loader__ = importlib.machinery.SourceFileLoader("__main__", path)
    main.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = main
    exec(compile(Path(path).read_bytes(), path, "exec"), main.__dict__)


def run_module(name: str, arguments: Sequence[str]) -> None:
    """Run a module as ``python -m name arguments`` would."""
    sys.argv = [name, *arguments]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def run_command(command: str, arguments: Sequence[str]) -> None:
    """Become another program."""
    os.execvp(command, [command, *arguments])


RUNNERS = {"script": run_script, "module": run_module, "command": run_command}


def run(kind: str, target: str, arguments: Sequence[str]) -> int:
    """Run the target and return the exit code it asks for; say on stderr and in the record why it failed."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # shown at once, and never half a line among other ranks'
        sys.stdout.reconfigure(line_buffering=True, write_through=False)
    _write_crashes_down()
    atexit.register(_leave_group)  # before any of the script's own, so it comes after them
    try:
        RUNNERS[kind](target, arguments)
        code, summary = 0, ""
    except SystemExit as stop:
        code, summary = _exit_code(stop)
    except BaseException as error:
        error.__traceback__ = _without_launcher(error.__traceback__)
        text = "".join(traceback.format_exception(error))
        summary = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]
        code = 130 if isinstance(error, KeyboardInterrupt) else 1
        record.write(record.now(summary, text, code))
        atexit.unregister(_leave_group)
        sys.excepthook(type(error), error, error.__traceback__)
        return code
    record.write(record.now(summary, "", code))
    if code != 0:  # peers may be gone, and leaving them in order could wait for them
        atexit.unregister(_leave_group)
    return code


def _leave_group() -> None:
    """Leave torch.distributed where the script did not.

    Left to the destruction of globals, torch 2.13 now and then aborts a process that has done its work.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _exit_code(stop: SystemExit) -> tuple[int, str]:
    """Return the code and the text of a sys.exit, and print the text as Python does."""
    if stop.code is None or isinstance(stop.code, int):
        return (stop.code or 0) & 0xFF, ""
    print(stop.code, file=sys.stderr, flush=True)
    return 1, str(stop.code)


def _without_launcher(trace: TracebackType | None) -> TracebackType | None:
    """Drop the frames in which the launcher called the script."""
    ours = (FOLDER, runpy.__file__, "<frozen runpy>")
    while trace is not None and trace.tb_frame.f_code.co_filename.startswith(ours):
        trace = trace.tb_next
    return trace


def crash_file() -> Path:
    """Where the Python stack of a crash in native code is written."""
    return Path(os.environ.get(record.VARIABLE, os.devnull)).with_name("crash.txt")


def _write_crashes_down() -> None:
    if os.environ.get(record.VARIABLE):
        faulthandler.enable(crash_file().open("w"))
