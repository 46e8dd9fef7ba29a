"""Scalars for Weights & Biases; ``WANDB_MODE=offline`` keeps them on disk."""

from __future__ import annotations

from collections.abc import Sequence

from deepspeed.monitor.base import Event, optional_package


class WandbMonitor:
    """Log to a run of `project`; the run a script has already started is used and left open."""

    def __init__(
        self, project: str | None = "deepspeed", group: str | None = None, team: str | None = None
    ) -> None:
        wandb = optional_package("wandb", package="wandb", key="wandb")
        self._ours = wandb.run is None
        self.run = wandb.run or wandb.init(project=project, group=group, entity=team)

    def write(self, events: Sequence[Event]) -> None:
        """Log the events, those of one step together."""
        steps: dict[int, dict[str, float]] = {}
        for name, value, step in events:
            steps.setdefault(step, {})[name] = value
        for step, values in steps.items():
            self.run.log(values, step=step)

    def close(self) -> None:
        """Finish the run, if this monitor started it."""
        if self._ours:
            self.run.finish()
