"""The whole configuration: attributes are the JSON's top-level keys."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import PrivateAttr

from deepspeed.common.logging import announce
from deepspeed.config.activation import ActivationCheckpointingSection
from deepspeed.config.autotuning import AutotuningSection
from deepspeed.config.base import (
    LOWER,
    Amount,
    Count,
    DtypeName,
    Factor,
    Interval,
    Section,
    Size,
    key,
    part,
    shown,
)
from deepspeed.config.batch import GAS, MICRO, TRAIN, BatchSizes
from deepspeed.config.checkpoint import CheckpointSection, NebulaSection
from deepspeed.config.compilation import AioSection, CompileSection
from deepspeed.config.compression import CompressionSection, QuantizeTrainingSection
from deepspeed.config.data import (
    CurriculumLearningSection,
    DataEfficiencySection,
    ProgressiveLayerDropSection,
)
from deepspeed.config.elasticity import ElasticitySection
from deepspeed.config.generation import HybridEngineSection, WeightQuantizationSection
from deepspeed.config.monitoring import (
    CometSection,
    CommsLoggerSection,
    CsvMonitorSection,
    FlopsProfilerSection,
    TensorBoardSection,
    TimersSection,
    WandbSection,
)
from deepspeed.config.optimizer import OptimizerSection, SchedulerSection
from deepspeed.config.parallel import ExpertParallelSection, PipelineSection, TensorParallelSection
from deepspeed.config.precision import AmpSection, AutocastSection, Bf16Section, DataTypesSection, Fp16Section
from deepspeed.config.sources import Provenance
from deepspeed.config.sparse_attention import SparseAttentionSection
from deepspeed.config.tree import lookup
from deepspeed.config.zero import ZeroSection
from deepspeed.errors import ConfigError


class DeepSpeedConfig(Section):
    """Every key, typed; made by `load_config`.

    `raw` is the caller's own dict and is never changed. A key given as "auto" has its default here until
    it is resolved.
    """

    train_batch_size: Count | None = key(None, "samples per optimizer step, over all ranks")
    train_micro_batch_size_per_gpu: Count | None = key(None, "samples per rank and forward")
    gradient_accumulation_steps: Count | None = key(
        None, "forwards per optimizer step; 1 when nothing says more"
    )
    managed_gradient_accumulation: bool = key(True, "false: every call of step is a boundary")
    optimizer: OptimizerSection | None = key(None, "the optimizer to build")
    scheduler: SchedulerSection | None = key(None, "the learning-rate schedule to build")
    gradient_clipping: Amount = key(1.0, "largest global norm of gradients; 0: no clipping")
    prescale_gradients: bool = key(False, "divide gradients before they are summed over ranks")
    gradient_predivide_factor: Factor = key(
        1.0, "divide by this before the sum and by ranks / this after; no effect with prescale_gradients"
    )
    gradient_allreduce_op: Annotated[Literal["mean", "sum"], LOWER] = key("mean", "mean or sum over ranks")
    communication_data_type: DtypeName | None = key(
        None, "dtype of gradient reductions; null: the gradients' own"
    )
    seq_parallel_communication_data_type: DtypeName = key("fp32", "the same over sequence-parallel ranks")
    sparse_gradients: bool = key(False, "refused when true: flat units reduce dense gradients")
    zero_optimization: ZeroSection = part(ZeroSection, "sharding")
    zero_allow_untested_optimizer: bool = key(
        False, "any element-wise optimizer under ZeRO, without a warning"
    )
    zero_force_ds_cpu_optimizer: bool = key(True, "with offload: insist on a CPU optimizer of this package")
    fp16: Fp16Section = part(Fp16Section, "half precision")
    bf16: Bf16Section = part(Bf16Section, "bfloat16")
    torch_autocast: AutocastSection = part(AutocastSection, "autocast")
    amp: AmpSection = part(AmpSection, "Apex")
    data_types: DataTypesSection = part(DataTypesSection, "dtypes")
    steps_per_print: Interval = key(None, "steps between progress lines; null or infinity: none")
    wall_clock_breakdown: bool = key(False, "log the time of forward, backward and step")
    memory_breakdown: bool = key(False, "log memory around forward, backward and step")
    dump_state: bool = key(False, "log the engine's settings before training")
    log_level: Annotated[Literal["debug", "info", "warning", "error", "critical"], LOWER] | None = key(
        None, "level of the package's logger"
    )
    verbose: bool = key(False, "short for log_level info")
    dataloader_drop_last: bool = key(False, "drop the last batch when it is not full")
    comms_logger: CommsLoggerSection = part(CommsLoggerSection, "record of collectives")
    tensorboard: TensorBoardSection = part(TensorBoardSection, "TensorBoard")
    wandb: WandbSection = part(WandbSection, "Weights & Biases")
    csv_monitor: CsvMonitorSection = part(CsvMonitorSection, "CSV files")
    comet: CometSection = part(CometSection, "Comet")
    flops_profiler: FlopsProfilerSection = part(FlopsProfilerSection, "flops")
    timers: TimersSection = part(TimersSection, "timers")
    checkpoint: CheckpointSection = part(CheckpointSection, "saved training state")
    nebula: NebulaSection = part(NebulaSection, "Azure")
    datastates_ckpt: Any = key(False, "settings of the DataStates engine; anything but false turns it on")
    activation_checkpointing: ActivationCheckpointingSection = part(
        ActivationCheckpointingSection, "recomputed layers"
    )
    sequence_parallel_size: Count | None = key(None, "ranks that share a sequence")
    data_parallel_size: Count | None = key(None, "data-parallel ranks; with the key above")
    use_data_before_expert_parallelism: bool = key(False, "order of ranks with experts")
    graph_harvesting: bool = key(False, "CUDA graphs of short kernel sequences")
    tensor_parallel: TensorParallelSection = part(TensorParallelSection, "split layers")
    expert_parallel: ExpertParallelSection = part(ExpertParallelSection, "split experts")
    pipeline: PipelineSection = part(PipelineSection, "pipe stages")
    compile: CompileSection = part(CompileSection, "graph passes")
    aio: AioSection = part(AioSection, "NVMe requests")
    hybrid_engine: HybridEngineSection = part(HybridEngineSection, "training and generation")
    weight_quantization: WeightQuantizationSection | None = key(None, "quantised frozen weights")
    data_efficiency: DataEfficiencySection = part(DataEfficiencySection, "sampling and routing")
    curriculum_learning: CurriculumLearningSection = part(CurriculumLearningSection, "older curriculum")
    progressive_layer_drop: ProgressiveLayerDropSection = part(ProgressiveLayerDropSection, "layer drop")
    compression_training: CompressionSection = part(CompressionSection, "compression")
    quantize_training: QuantizeTrainingSection = part(QuantizeTrainingSection, "older quantisation")
    autotuning: AutotuningSection = part(AutotuningSection, "search for settings")
    elasticity: ElasticitySection = part(ElasticitySection, "batches for many world sizes")
    sparse_attention: SparseAttentionSection | None = key(None, "block-sparse patterns")
    allgather_size: Size = key(500_000_000, "no effect without the boolean zero_optimization")
    disable_allgather: bool = key(False, "no effect")
    eigenvalue: Any = key(None, "no effect; quantize_training.eigenvalue is another key")
    moe: Any = key(None, "no effect; experts are configured in Python")
    vocabulary_size: Size | None = key(None, "no effect")

    _raw: Mapping[str, Any] = PrivateAttr(default_factory=dict)
    _provenance: Provenance = PrivateAttr(default_factory=Provenance)
    _batch: BatchSizes = PrivateAttr(default=BatchSizes(None, None, 1, 1))

    @property
    def raw(self) -> Mapping[str, Any]:
        """The caller's dict itself, or what was parsed from the file."""
        return self._raw

    @property
    def batch(self) -> BatchSizes:
        """The solved batch triangle; sizes are None while "auto" waits for data."""
        return self._batch

    def set_batch(self, sizes: BatchSizes, source: str) -> None:
        """Replace the batch sizes; `source` says who did, e.g. ``set_train_batch_size``."""
        self._batch = sizes
        for path, value in ((TRAIN, sizes.train), (MICRO, sizes.micro), (GAS, sizes.gas)):
            if value is None or value == getattr(self, path):
                continue
            setattr(self, path, value)
            if path in self._provenance.unresolved():
                self._provenance.auto[path] = source
            else:
                self._provenance.chosen[path] = source

    def complete_batch(self, micro: int, reason: str) -> BatchSizes:
        """Fill sizes left open by "auto" from a micro-batch seen in the data; return all sizes."""
        if self._batch.micro is None:
            self.set_batch(self._batch.complete(micro), reason)
        return self._batch

    def source_of(self, path: str) -> str:
        """Say where the value at `path` came from: ``user``, ``default``, ``auto: WHY``, ..."""
        return self._provenance.source_of(path)

    def auto_paths(self) -> list[str]:
        """Return every path the user gave as "auto", resolved or not."""
        return list(self._provenance.auto)

    def is_auto(self, path: str) -> bool:
        """Say whether the user gave "auto" at `path`."""
        return path in self._provenance.auto

    def unresolved(self) -> list[str]:
        """Return the "auto" paths that have no value yet."""
        return self._provenance.unresolved()

    def resolve_auto(self, path: str, value: Any, reason: str) -> None:
        """Give an "auto" key its value, validated, and remember why."""
        self._require_auto(path)
        section, _, name = path.rpartition(".")
        parent = lookup(self, section) if section else self
        if isinstance(parent, dict):
            parent[name] = value
        else:
            try:
                setattr(parent, name, value)
            except ConfigError as error:
                raise ConfigError(f"{section}.{error}" if section else str(error)) from None
        self._provenance.auto[path] = reason

    def keep_default(self, path: str, reason: str) -> None:
        """Settle an "auto" key by leaving it out, so that the default of what reads it applies."""
        self._require_auto(path)
        self._provenance.auto[path] = reason

    def announce_resolutions(self) -> None:
        """Report, in one line on rank 0, what "auto" became; each key once."""
        lines = []
        for path in self._provenance.fresh():
            value = lookup(self, path)
            told = "left out" if value is None else f"= {shown(value)}"
            lines.append(f"{path} {told} ({self._provenance.auto[path]})")
        if lines:
            announce(f'"auto" in the configuration: {"; ".join(lines)}')

    def _require_auto(self, path: str) -> None:
        if path not in self._provenance.auto:
            raise ConfigError(f'{path}: expected "auto" in the configuration, got {self.source_of(path)}')
