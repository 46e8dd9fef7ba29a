"""Scalars for Comet."""

from __future__ import annotations

from collections.abc import Sequence

from deepspeed.monitor.base import Event, optional_package


class CometMonitor:
    """Log to a Comet experiment, at most once in `samples_log_interval` steps for each name."""

    def __init__(
        self,
        samples_log_interval: int = 100,
        *,
        project: str | None = None,
        workspace: str | None = None,
        api_key: str | None = None,
        experiment_name: str | None = None,
        experiment_key: str | None = None,
        online: bool | None = None,
        mode: str | None = None,
    ) -> None:
        comet = optional_package("comet_ml", package="comet-ml", key="comet")
        self.samples_log_interval = samples_log_interval
        self.experiment = comet.start(
            api_key=api_key,
            project=project,
            workspace=workspace,
            experiment_key=experiment_key,
            mode=mode,
            online=online,
        )
        if experiment_name is not None:
            self.experiment.set_name(experiment_name)
        self._last: dict[str, int] = {}

    def write(self, events: Sequence[Event]) -> None:
        """Log each event whose name was not logged within the interval."""
        for name, value, step in events:
            last = self._last.get(name)
            if last is None or step - last >= self.samples_log_interval:
                self._last[name] = step
                self.experiment.log_metric(name, value, step=step)

    def close(self) -> None:
        """Upload what is left and end the experiment."""
        self.experiment.end()
