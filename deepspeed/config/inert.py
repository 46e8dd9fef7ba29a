"""Keys that are checked and then change nothing, and why: the table behind "never accepted and ignored"."""

from __future__ import annotations

from deepspeed.common.logging import warn_once
from deepspeed.config.base import shown
from deepspeed.config.root import DeepSpeedConfig
from deepspeed.config.tree import lookup

INERT = {
    "bf16.immediate_grad_update": "gradients are added to their sum once their unit is complete",
    "timers.throughput.enabled": "samples per second are a by-product of progress lines and monitors",
    "timers.throughput.synchronized": "reading the loss waits for the device anyway",
    "zero_optimization.contiguous_gradients": "gradients of a unit always lie in one buffer",
    "zero_optimization.enable_sanity_checks": "the checks that cost nothing are always on",
    "zero_optimization.log_trace_cache_warnings": "there is no trace that a changed order could invalidate",
    "zero_optimization.reduce_scatter": "gradients only ever go to the rank that owns them",
    "zero_optimization.round_robin_gradients": "every rank owns an equal part of every unit",
}
"""A value other than the default is reported once."""

GRANTED = {
    "zero_allow_untested_optimizer": "every optimizer is tried out when the engine is made",
    "zero_force_ds_cpu_optimizer": "any optimizer that can be sharded may be offloaded",
}
"""What these ask for is always the case; there is nothing to report."""


def report_inert(config: DeepSpeedConfig) -> None:
    """Warn once of the inert keys that the user has set to something else than their default."""
    lines = []
    for path, reason in INERT.items():
        section = lookup(config, path.rpartition(".")[0])
        name = path.rpartition(".")[2]
        value = getattr(section, name)
        if config.source_of(path) == "user" and value != type(section).model_fields[name].default:
            lines.append(f"{path} = {shown(value)} ({reason})")
    if lines:
        warn_once(f"configuration keys without effect: {'; '.join(lines)}")
