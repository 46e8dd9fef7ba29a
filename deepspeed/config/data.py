"""Data efficiency: curricula, dynamic batches, random token dropping, progressive layer drop."""

from typing import Annotated, Literal

from deepspeed.config.base import LOWER, Amount, Count, FilePath, Integer, Section, Size, key, part


class ScheduleSection(Section):
    """Numbers of a difficulty schedule; which are needed depends on its type."""

    total_curriculum_step: Count | None = key(None, "steps until the greatest difficulty")
    difficulty_step: Count | None = key(None, "difficulty grows in multiples of this")
    root_degree: Count | None = key(None, "degree of fixed_root")
    difficulty: list[Integer] | None = key(None, "difficulties of fixed_discrete")
    max_step: list[Integer] | None = key(None, "last step of each difficulty but the last")


ScheduleType = Annotated[Literal["fixed_linear", "fixed_root", "fixed_discrete", "custom"], LOWER]


class CurriculumMetricSection(Section):
    """One measure of difficulty."""

    index_to_sample_path: FilePath | None = key(None, "analyzer output: samples by difficulty")
    index_to_metric_path: FilePath | None = key(None, "analyzer output: difficulty by sample")
    difficulty_type: Annotated[Literal["value", "percentile"], LOWER] | None = key(None, "how it is counted")
    clustering_type: Annotated[Literal["single_cluster", "schedule_based"], LOWER] | None = key(
        None, "how samples are grouped"
    )
    min_difficulty: Integer | None = key(None, "at the start")
    max_difficulty: Integer | None = key(None, "at the end")
    schedule_type: ScheduleType | None = key(None, "how it grows")
    schedule_config: ScheduleSection | None = key(None, "numbers of the schedule")


class SamplingCurriculumSection(Section):
    """Samples chosen by difficulty."""

    enabled: bool = key(False, "use it")
    data_cluster_path: FilePath | None = key(None, "working folder")
    curriculum_metrics: dict[str, CurriculumMetricSection] | None = key(None, "name -> measure")


class DynamicBatchingSection(Section):
    """Batches by number of tokens."""

    enabled: bool = key(False, "use it")
    metrics_path: FilePath | None = key(None, "lengths of samples")
    lr_scaling_method: Annotated[Literal["linear", "sqrt", "none"], LOWER] = key("linear", "lr by batch size")
    min_batch_size: Count = key(1, "smallest batch")
    max_batch_size: Count | None = key(None, "largest batch")
    sequence_picking_order: Annotated[Literal["dataloader", "random", "seqlen"], LOWER] = key(
        "dataloader", "order of samples"
    )
    max_tokens: Count | None = key(None, "tokens per batch")
    verbose: bool = key(False, "print batches")


class DataSamplingSection(Section):
    """Which samples, in which order."""

    enabled: bool = key(False, "without effect: curriculum_learning.enabled decides")
    num_epochs: Count = key(1000, "length of the index")
    num_workers: Size = key(0, "loader processes")
    pin_memory: bool = key(False, "page-locked batches")
    curriculum_learning: SamplingCurriculumSection = part(SamplingCurriculumSection, "by difficulty")
    dynamic_batching: DynamicBatchingSection = part(DynamicBatchingSection, "by tokens")


class TokenScheduleConfigSection(Section):
    """Numbers of the token schedule."""

    require_steps: Count | None = key(None, "steps until all tokens are kept")
    seq_per_step: Count | None = key(None, "kept tokens grow in multiples of this")


class TokenScheduleSection(Section):
    """How many tokens are kept."""

    min_value: Count | None = key(None, "tokens at the start")
    max_value: Count | None = key(None, "tokens at the end")
    schedule_type: Literal["fixed_linear"] | None = key(None, "how it grows")
    schedule_config: TokenScheduleConfigSection | None = key(None, "numbers of the schedule")


class LayerTokenLrSection(Section):
    """Learning rate by tokens; never supported."""

    enabled: bool = key(False, "must be false")
    total_layer_tokens: Count | None = key(None, "without effect")
    warmup_type: str | None = key(None, "without effect")
    warmup_layer_tokens: Count | None = key(None, "without effect")


class RandomLtdSection(Section):
    """Random dropping of tokens in the middle layers."""

    enabled: bool = key(False, "use it")
    total_layer_num: Count | None = key(None, "layers of the model")
    random_ltd_layer_num: Count | None = key(None, "layers that drop tokens")
    random_ltd_layer_id: list[Integer] | None = key(None, "which layers")
    model_mask_name: str | None = key(None, "name of the mask argument")
    model_type: Annotated[Literal["encoder", "decoder"], LOWER] | None = key(None, "kind of model")
    hidden_state_order: Annotated[Literal["batch_seq_dim", "seq_batch_dim"], LOWER] | None = key(
        None, "order of dims"
    )
    random_ltd_schedule: TokenScheduleSection | None = key(None, "how many tokens are kept")
    layer_token_lr_schedule: LayerTokenLrSection = part(LayerTokenLrSection, "never supported")
    global_batch_size: Count | None = key(None, "filled in by the engine")
    micro_batch_size: Count | None = key(None, "filled in by the engine")


class DataRoutingSection(Section):
    """Which tokens pass through which layers."""

    enabled: bool = key(False, "without effect: random_ltd.enabled decides")
    random_ltd: RandomLtdSection = part(RandomLtdSection, "token dropping")


class DataEfficiencySection(Section):
    """Sampling and routing."""

    enabled: bool = key(False, "without effect: the parts decide")
    seed: Integer = key(1234, "of the sampler")
    data_sampling: DataSamplingSection = part(DataSamplingSection, "which samples")
    data_routing: DataRoutingSection = part(DataRoutingSection, "which tokens")


class CurriculumLearningSection(Section):
    """The older curriculum: sequence length grows with the step."""

    enabled: bool = key(False, "use it")
    curriculum_type: Literal["seqlen"] | None = key(None, "what grows")
    min_difficulty: Integer | None = key(None, "at the start")
    max_difficulty: Integer | None = key(None, "at the end")
    schedule_type: ScheduleType | None = key(None, "how it grows")
    schedule_config: ScheduleSection | None = key(None, "numbers of the schedule")


class ProgressiveLayerDropSection(Section):
    """Layers dropped more often as training goes on."""

    enabled: bool = key(False, "use it")
    theta: Amount = key(1.0, "share of layers kept in the end")
    gamma: Amount = key(0.001, "how fast that share is reached")
