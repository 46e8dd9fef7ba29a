"""What ``"auto"`` becomes, once the device, the model and the optimizer are known.

Batch sizes are the business of batch.py; everything else left as "auto" is settled here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deepspeed.config.batch import GAS, MICRO, TRAIN
from deepspeed.config.root import DeepSpeedConfig
from deepspeed.config.zero import ZeroSection
from deepspeed.errors import ConfigError

FP16, BF16 = "fp16.enabled", "bf16.enabled"
BUCKET = "zero_optimization.reduce_bucket_size"
PREFETCH = "zero_optimization.stage3_prefetch_bucket_size"
PERSISTENCE = "zero_optimization.stage3_param_persistence_threshold"


def resolve_precision(config: DeepSpeedConfig, *, bf16_supported: bool) -> None:
    """Turn bf16 on where ``bf16.enabled`` is "auto", the device has it and nothing else is asked for."""
    waiting = config.unresolved()
    if BF16 in waiting:
        other = next((name for name in ("fp16", "torch_autocast") if getattr(config, name).enabled), None)
        chosen = bf16_supported and other is None
        reason = f"{other} is on" if other else f"the device {'has' if chosen else 'lacks'} bf16"
        config.resolve_auto(BF16, chosen, reason)
    if FP16 in waiting:
        config.resolve_auto(FP16, False, "bf16 is on" if config.bf16.enabled else "fp16 must be asked for")


def resolve_from_model(config: DeepSpeedConfig, *, hidden_size: int | None, total_numel: int) -> None:
    """Settle every "auto" but those of batch sizes and the scheduler, from the model's measures.

    `hidden_size` is the model's width, None when it has none; `total_numel` counts its parameters.
    Arguments of the optimizer are left out, so that its own defaults apply.
    """
    rules = _bucket_sizes(hidden_size, total_numel)
    for path in config.unresolved():
        if path.startswith("scheduler.params.") or path in (TRAIN, MICRO, GAS):
            continue
        if path in rules:
            config.resolve_auto(path, *rules[path])
        elif path.startswith("optimizer.params."):
            config.keep_default(path, "the optimizer's own")
        else:
            config.keep_default(path, "default")


def _bucket_sizes(hidden_size: int | None, total_numel: int) -> dict[str, tuple[int, str]]:
    if hidden_size is None:
        bucket = min(ZeroSection().reduce_bucket_size, max(1, total_numel))
        return {BUCKET: (bucket, f"{total_numel} parameters, width unknown")}
    width = f"model width {hidden_size}"
    return {
        BUCKET: (hidden_size * hidden_size, width),
        PREFETCH: (int(0.9 * hidden_size * hidden_size), width),
        PERSISTENCE: (10 * hidden_size, width),
    }


def resolve_scheduler(config: DeepSpeedConfig, *, optimizer_lr: float | None) -> None:
    """Settle "auto" in ``scheduler.params``; call it only when that scheduler is to be built.

    `optimizer_lr` is the optimizer's learning rate. Raises ConfigError for what cannot be inferred.
    """
    known: Mapping[str, tuple[Any, str]] = {"warmup_min_lr": (0.0, "default")}
    if optimizer_lr is not None:
        known = {**known, "warmup_max_lr": (optimizer_lr, "the optimizer's lr")}
    for path in config.unresolved():
        section, _, name = path.rpartition(".")
        if section != "scheduler.params":
            continue
        if name in known:
            config.resolve_auto(path, *known[name])
        elif name in ("total_num_steps", "cycle_min_lr", "cycle_max_lr"):
            raise ConfigError(
                f'{path}: expected a number, got "auto"; it cannot be inferred: '
                f"{_missing(name)}; write the number, or pass lr_scheduler to initialize"
            )
        else:
            config.keep_default(path, "the schedule's own default")


def _missing(name: str) -> str:
    if name == "total_num_steps":
        return "the number of optimizer steps of the whole run is missing"
    return "the range of learning rates is missing"
