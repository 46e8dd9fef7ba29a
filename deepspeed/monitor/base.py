"""What every monitor is, and how a missing package is reported."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import Any, Protocol

from deepspeed.errors import ConfigError

Event = tuple[str, float, int]  # name, value, step


class Monitor(Protocol):
    """Writes scalars somewhere."""

    def write(self, events: Sequence[Event]) -> None:
        """Write (name, value, step) events."""

    def close(self) -> None:
        """Write what is still held back and let go of files and connections."""


def optional_package(module: str, *, package: str, key: str) -> Any:
    """Import an optional module, or say which package to install for the config section `key`."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{key}.enabled: expected the package {package} to be installed, got {error}; "
            "run pip install 'deepspeed[monitors]', or set it to false"
        ) from error


def output_folder(output_path: str, job_name: str, default: str) -> str:
    """Make and return the folder of a job: `output_path`/`job_name`, under `default` when no path is set."""
    folder = os.path.join(output_path or default, job_name)
    os.makedirs(folder, exist_ok=True)
    return folder
