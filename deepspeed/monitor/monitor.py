"""Which monitors a configuration asks for; they write on rank 0 only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deepspeed.common.logging import current_rank
from deepspeed.monitor.base import Event, Monitor
from deepspeed.monitor.comet import CometMonitor
from deepspeed.monitor.csv_files import CsvMonitor
from deepspeed.monitor.tensorboard import TensorBoardMonitor
from deepspeed.monitor.wandb import WandbMonitor

__all__ = ["Event", "Monitor", "MonitorMaster", "build_monitors"]


def build_monitors(
    *, tensorboard: Any = None, wandb: Any = None, csv: Any = None, comet: Any = None
) -> list[Monitor]:
    """Make the monitors whose config sections are enabled; on ranks other than 0, none.

    The sections have the fields of the configuration: ``enabled``, and what each monitor's class takes.
    Raises ConfigError naming the package to install where one is missing.
    """
    if current_rank() != 0:
        return []
    monitors: list[Monitor] = []
    if tensorboard is not None and tensorboard.enabled:
        monitors.append(TensorBoardMonitor(tensorboard.output_path, tensorboard.job_name))
    if wandb is not None and wandb.enabled:
        monitors.append(WandbMonitor(wandb.project, wandb.group, wandb.team))
    if csv is not None and csv.enabled:
        monitors.append(CsvMonitor(csv.output_path, csv.job_name))
    if comet is not None and comet.enabled:
        monitors.append(
            CometMonitor(
                comet.samples_log_interval,
                project=comet.project,
                workspace=comet.workspace,
                api_key=comet.api_key,
                experiment_name=comet.experiment_name,
                experiment_key=comet.experiment_key,
                online=comet.online,
                mode=comet.mode,
            )
        )
    return monitors


class MonitorMaster:
    """All monitors of a configuration (an object with the four sections) as one."""

    def __init__(self, config: Any) -> None:
        self.monitors = build_monitors(
            tensorboard=config.tensorboard, wandb=config.wandb, csv=config.csv_monitor, comet=config.comet
        )
        self.enabled = bool(self.monitors)

    def write_events(self, event_list: Sequence[Event]) -> None:
        """Write (name, value, step) events to every monitor."""
        for monitor in self.monitors:
            monitor.write(event_list)

    def close(self) -> None:
        """Close every monitor."""
        for monitor in self.monitors:
            monitor.close()
