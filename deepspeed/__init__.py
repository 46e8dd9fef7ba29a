"""DeepSpeed's API for today's PyTorch: train very large models on the hardware at hand.

    engine, optimizer, loader, scheduler = deepspeed.initialize(model=model, config="ds_config.json")
    loss = engine(batch)
    engine.backward(loss)
    engine.step()

Note [Lazy door]
Names are imported when they are first used, from the table below, so that ``import deepspeed`` costs little
and touches no device.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from deepspeed.common.lazy import explain_missing
from deepspeed.version import __version__

if TYPE_CHECKING:
    from deepspeed.accelerator import get_accelerator
    from deepspeed.activation_checkpointing import checkpointing
    from deepspeed.arguments import add_config_arguments
    from deepspeed.comm import init_distributed
    from deepspeed.config import DeepSpeedConfig
    from deepspeed.engine.engine import DeepSpeedEngine
    from deepspeed.engine.initialize import initialize

version = __version__

_NAMES = {
    "initialize": "deepspeed.engine.initialize",
    "DeepSpeedEngine": "deepspeed.engine.engine",
    "DeepSpeedConfig": "deepspeed.config",
    "add_config_arguments": "deepspeed.arguments",
    "init_distributed": "deepspeed.comm",
    "get_accelerator": "deepspeed.accelerator",
    "checkpointing": "deepspeed.activation_checkpointing",
    "logger": "deepspeed.common.logging",
    "log_dist": "deepspeed.common.logging",
    "OnDevice": "deepspeed.zero.on_device",
}
_MODULES = frozenset(
    {
        "accelerator",
        "checkpoint",
        "comm",
        "ops",
        "runtime",
        "utils",
        "zero",
        "monitor",
        "launcher",
        "git_version_info",
    }
)
_LATER_MODULES = {
    "deepspeed.autotuning": "autotuning",
    "deepspeed.compression": "compression",
    "deepspeed.elasticity": "elasticity",
    "deepspeed.inference": "inference",
    "deepspeed.module_inject": "tensor parallelism",
    "deepspeed.moe": "expert parallelism",
    "deepspeed.ops.sparse_attention": "sparse attention",
    "deepspeed.ops.transformer": "the transformer kernel",
    "deepspeed.pipe": "pipeline parallelism",
    "deepspeed.profiling": "the flops profiler",
    "deepspeed.sequence": "sequence parallelism",
}
_LATER = {
    **{name.removeprefix("deepspeed."): feature for name, feature in _LATER_MODULES.items()},
    "DeepSpeedTransformerConfig": "the transformer kernel",
    "DeepSpeedTransformerLayer": "the transformer kernel",
    "InferenceEngine": "inference",
    "PipelineEngine": "pipeline parallelism",
    "PipelineModule": "pipeline parallelism",
    "init_inference": "inference",
    "replace_transformer_layer": "inference",
    "tp_model_init": "tensor parallelism",
}
explain_missing(_LATER_MODULES)

__all__ = [
    "DeepSpeedConfig",
    "DeepSpeedEngine",
    "__version__",
    "add_config_arguments",
    "checkpointing",
    "get_accelerator",
    "init_distributed",
    "initialize",
    "version",
]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"deepspeed.{name}")
    reason = f"; {_LATER[name]} is not built yet" if name in _LATER else ""
    raise AttributeError(f"module 'deepspeed' has no attribute {name!r}{reason}")
