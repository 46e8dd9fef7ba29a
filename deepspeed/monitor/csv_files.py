"""Scalars as CSV files: one file per name, with the columns step and value."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Sequence

from deepspeed.monitor.base import Event, output_folder


class CsvMonitor:
    """Append to files in ``<output_path>/<job_name>``: ``Train/Samples/lr`` to ``Train_Samples_lr.csv``."""

    def __init__(self, output_path: str = "", job_name: str = "DeepSpeedJobName") -> None:
        self.folder = output_folder(output_path, job_name, "csv_monitor")

    def write(self, events: Sequence[Event]) -> None:
        """Append a row per event; a new file begins with a header."""
        for name, value, step in events:
            path = self.path(name)
            new = not os.path.exists(path)
            with open(path, "a", newline="", encoding="utf-8") as file:
                rows = csv.writer(file)
                if new:
                    rows.writerow(["step", "value"])
                rows.writerow([step, value])

    def close(self) -> None:
        """Do nothing: every row is already on disk."""

    def path(self, name: str) -> str:
        """Return the file of an event name; what a file name may not hold becomes an underscore."""
        safe = re.sub(r"[^\w.=+-]+", "_", name).strip("._") or "event"
        return os.path.join(self.folder, f"{safe}.csv")
