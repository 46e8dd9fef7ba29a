"""The package's logger: standard ``logging``, quiet by default, one line per decision.

The logger is named ``DeepSpeed`` because trainers attach handlers to it by that name.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Collection

LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
}


class _StderrHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Write to whatever ``sys.stderr`` is now, so that captured output stays captured."""

    @property
    def stream(self):  # type: ignore[no-untyped-def]
        return sys.stderr

    @stream.setter
    def stream(self, _value: object) -> None:
        return


def _make_logger() -> logging.Logger:
    made = logging.getLogger("DeepSpeed")
    made.setLevel(LEVELS.get(os.environ.get("DS_LOG_LEVEL", "").lower(), logging.WARNING))
    made.propagate = False
    if not made.handlers:
        handler = _StderrHandler()
        handler.setFormatter(logging.Formatter("[%(asctime)s] [%(levelname)s] %(message)s", "%H:%M:%S"))
        made.addHandler(handler)
    return made


logger = _make_logger()


def current_rank() -> int:
    """Return this process's global rank: from the process group, else from ``RANK``, else 0."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK", "0") or 0)


def log_dist(message: str, ranks: Collection[int] | None = None, level: int = logging.INFO) -> None:
    """Log `message` on the given global ranks only; None or a collection holding -1 means every rank."""
    if ranks is None or -1 in ranks or current_rank() in ranks:
        logger.log(level, message)


def announce(message: str) -> None:
    """Tell the user, on rank 0, of something important that was chosen for them.

    Shown at WARNING, the default level, because a choice the user did not make must be visible.
    """
    log_dist(message, ranks=[0], level=logging.WARNING)


def warn_once(message: str) -> None:
    """Warn on rank 0, once per process for each text."""
    seen: set[str] = logger.__dict__.setdefault("_warned", set())
    if message not in seen:
        seen.add(message)
        log_dist(message, ranks=[0], level=logging.WARNING)


def set_log_level(name: str) -> None:
    """Set the logger's level by its lower-case name (see `LEVELS`)."""
    logger.setLevel(LEVELS[name])
