"""What this release parses and checks but does not have: asking for it is refused, never ignored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from deepspeed.config.base import Section, shown
from deepspeed.config.compression import CompressionSection
from deepspeed.config.root import DeepSpeedConfig
from deepspeed.config.tree import lookup
from deepspeed.errors import NotBuiltError

UNBUILT_OPTIMIZERS = ("onebitadam", "onebitlamb", "zerooneadam", "muadam", "muadamw", "musgd")


@dataclass(frozen=True)
class Unbuilt:
    """A key, the values of it that ask for something, and what that is.

    `settings` are patterns of further keys that matter only together with it; beside a key ``x.enabled``
    those are all keys of ``x``.
    """

    path: str
    feature: str
    asks: Callable[[Any], bool] = bool
    way_out: str = "remove the key or turn it off"
    settings: tuple[str, ...] = ()

    def governs(self, path: str) -> bool:
        """Whether the key at `path` matters only where this one asks for its feature."""
        section, _, name = self.path.rpartition(".")
        beside = (f"{section}.*",) if section and name == "enabled" else ()
        return path != self.path and any(fnmatchcase(path, one) for one in (*beside, *self.settings))


def _above(low: int) -> Callable[[Any], bool]:
    return lambda value: value is not None and value > low


def _given(value: Any) -> bool:
    return value is not None


def _is(answer: bool) -> Callable[[Any], bool]:
    return lambda value: value is answer


def _techniques() -> list[Unbuilt]:
    names = [name for name in CompressionSection.model_fields if name != "layer_reduction"]
    return [
        Unbuilt(
            f"compression_training.{name}.shared_parameters.enabled",
            "compression",
            settings=(f"compression_training.{name}.*",),
        )
        for name in names
    ]


ZERO = "zero_optimization"
TABLE = [
    Unbuilt(
        f"{ZERO}.zenflow",
        "ZenFlow, which trains with stale gradients",
        _given,
        "remove the section: offload_optimizer alone gives the results of plain PyTorch",
        settings=(f"{ZERO}.zenflow.*",),
    ),
    Unbuilt(f"{ZERO}.zero_quantized_weights", "quantised gathers"),
    Unbuilt(f"{ZERO}.zero_quantized_nontrainable_weights", "quantised frozen weights"),
    Unbuilt(f"{ZERO}.zero_quantized_gradients", "quantised reductions"),
    Unbuilt(
        f"{ZERO}.zeropp_loco_param",
        "error feedback of quantised reductions",
        _given,
        settings=(f"{ZERO}.zeropp_loco_param.*",),
    ),
    Unbuilt(f"{ZERO}.load_from_fp32_weights", "loading master weights from rounded ones", _is(False)),
    Unbuilt(
        "optimizer.type",
        "this optimizer",
        lambda name: isinstance(name, str) and name.lower() in UNBUILT_OPTIMIZERS,
        "use Adam, AdamW or Lamb",
    ),
    Unbuilt("flops_profiler.enabled", "the flops profiler"),
    Unbuilt("checkpoint.parallel_write.pipeline_stage", "shared writing of a pipe stage"),
    Unbuilt("checkpoint.checkpoint_serialization", "torch's old file format", _is(False)),
    Unbuilt("nebula.enabled", "Nebula"),
    Unbuilt("datastates_ckpt", "DataStates", lambda value: value is not False),
    Unbuilt(
        "sequence_parallel_size",
        "sequence parallelism",
        _above(1),
        settings=("seq_parallel_communication_data_type",),
    ),
    Unbuilt("use_data_before_expert_parallelism", "expert parallelism"),
    Unbuilt("graph_harvesting", "CUDA graphs of the step"),
    Unbuilt("tensor_parallel.autotp_size", "tensor parallelism", _above(1), settings=("tensor_parallel.*",)),
    Unbuilt("tensor_parallel.tensor_parallel.tp_size", "tensor parallelism", _above(1)),
    Unbuilt("expert_parallel.enabled", "expert parallelism"),
    Unbuilt(
        "pipeline.activation_checkpoint_interval", "pipeline parallelism", _above(0), settings=("pipeline.*",)
    ),
    Unbuilt(
        "compile.deepcompile",
        "graph passes",
        way_out="call engine.compile without it",
        settings=("compile.*",),
    ),
    Unbuilt("compile.passes", "graph passes", way_out="call engine.compile without them"),
    Unbuilt("compile.offload_activation", "graph passes"),
    Unbuilt("compile.offload_opt_states", "graph passes"),
    Unbuilt("compile.offload_parameters", "graph passes"),
    Unbuilt("compile.free_activation", "graph passes"),
    Unbuilt("compile.symmetric_memory", "graph passes"),
    Unbuilt("aio.use_gds", "GPUDirect Storage"),
    Unbuilt("hybrid_engine.enabled", "the hybrid engine"),
    Unbuilt("weight_quantization.enabled", "weight quantisation"),
    Unbuilt(
        "data_efficiency.data_sampling.curriculum_learning.enabled",
        "curriculum sampling",
        settings=("data_efficiency.seed", "data_efficiency.data_sampling.*"),
    ),
    Unbuilt("data_efficiency.data_sampling.dynamic_batching.enabled", "dynamic batching"),
    Unbuilt("data_efficiency.data_routing.random_ltd.enabled", "random token dropping"),
    Unbuilt("curriculum_learning.enabled", "the sequence-length curriculum"),
    Unbuilt("progressive_layer_drop.enabled", "progressive layer drop"),
    Unbuilt("compression_training.layer_reduction.enabled", "compression"),
    *_techniques(),
    Unbuilt("quantize_training.eigenvalue.enabled", "quantised training"),
    Unbuilt("autotuning.enabled", "autotuning"),
    Unbuilt("elasticity.enabled", "elastic batch sizes"),
    Unbuilt(
        "sparse_attention.mode",
        "sparse attention",
        lambda mode: mode not in (None, "dense"),
        settings=("sparse_attention.*",),
    ),
]


def asked(config: DeepSpeedConfig) -> list[Unbuilt]:
    """Return the rows of the table that `config` asks for."""
    return [row for row in TABLE if row.asks(lookup(config, row.path))]


def refuse_unbuilt(config: DeepSpeedConfig) -> None:
    """Raise NotBuiltError with one line for each feature `config` asks for that does not exist yet."""
    lines = [_line(row, lookup(config, row.path)) for row in asked(config)]
    if lines:
        raise NotBuiltError("\n".join(lines))


def _line(row: Unbuilt, value: Any) -> str:
    got = shown(value.model_dump(exclude_unset=True) if isinstance(value, Section) else value)
    return f"{row.path}: {row.feature} is not built yet, got {got}; {row.way_out}"
