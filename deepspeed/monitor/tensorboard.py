"""Scalars for TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence

from deepspeed.monitor.base import Event, optional_package, output_folder


class TensorBoardMonitor:
    """Write event files to ``<output_path>/<job_name>``; the path is ``./runs`` when none is set."""

    def __init__(self, output_path: str = "", job_name: str = "DeepSpeedJobName") -> None:
        writers = optional_package("torch.utils.tensorboard", package="tensorboard", key="tensorboard")
        self.folder = output_folder(output_path, job_name, "runs")
        self.summary_writer = writers.SummaryWriter(log_dir=self.folder)

    def write(self, events: Sequence[Event]) -> None:
        """Add a scalar per event."""
        for name, value, step in events:
            self.summary_writer.add_scalar(name, value, step)
        self.summary_writer.flush()

    def close(self) -> None:
        """Finish the event file."""
        self.summary_writer.close()
