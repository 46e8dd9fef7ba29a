"""``optimizer`` and ``scheduler``: a type name and its keyword arguments.

Names and arguments are checked where the objects are built, because torch's own classes are accepted too.
"""

from typing import Any

from deepspeed.config.base import Section, key


class OptimizerSection(Section):
    """The optimizer the engine builds when none is given to initialize."""

    type: str | None = key(None, "Adam, AdamW, SGD, Adagrad, Lion, Lamb, Muon, or any class of torch.optim")
    params: dict[str, Any] = key({}, "keyword arguments: lr, betas, eps, weight_decay, ...")
    legacy_fusion: bool = key(False, "no effect")


class SchedulerSection(Section):
    """The learning-rate schedule the engine builds when none is given to initialize."""

    type: str | None = key(
        None,
        "WarmupLR, WarmupDecayLR, WarmupCosineLR, OneCycle, LRRangeTest, or one of torch.optim.lr_scheduler",
    )
    params: dict[str, Any] = key({}, "keyword arguments of the schedule")
