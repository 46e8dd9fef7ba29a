"""What joins the engine at its moments; `make_features` reads which of them the configuration asks for."""

from __future__ import annotations

from deepspeed.config import DeepSpeedConfig
from deepspeed.engine.feature import Feature
from deepspeed.engine.features.breakdown import MemoryBreakdown, TimeBreakdown
from deepspeed.engine.features.metrics import StepMetrics
from deepspeed.engine.features.monitoring import Monitoring
from deepspeed.engine.features.progress import Progress
from deepspeed.monitor import build_monitors
from deepspeed.zero.stage import RankGroup


def make_features(settings: DeepSpeedConfig, data_parallel: RankGroup) -> list[Feature]:
    """Make the features that the configuration asks for, in the order they run."""
    features: list[Feature] = []
    monitored = any(
        section.enabled
        for section in (settings.tensorboard, settings.wandb, settings.csv_monitor, settings.comet)
    )
    every = settings.steps_per_print
    if monitored or every is not None:
        metrics = StepMetrics(data_parallel)
        features.append(metrics)
        if monitored:
            monitors = build_monitors(
                tensorboard=settings.tensorboard,
                wandb=settings.wandb,
                csv=settings.csv_monitor,
                comet=settings.comet,
            )
            features.append(Monitoring(metrics, monitors))
        if every is not None:
            features.append(Progress(metrics, every))
    if settings.wall_clock_breakdown:
        features.append(TimeBreakdown())
    if settings.memory_breakdown:
        features.append(MemoryBreakdown())
    return features
