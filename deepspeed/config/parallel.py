"""``tensor_parallel``, ``expert_parallel`` and ``pipeline``."""

from typing import Annotated, Any, ClassVar, Literal

from deepspeed.config.base import (
    LOWER,
    Count,
    DtypeName,
    IntegerOrAuto,
    Number,
    NumberOrAuto,
    Section,
    Size,
    key,
    part,
)


class TensorParallelGroupSection(Section):
    """Sizes and groups given by a program."""

    tp_size: Count = key(1, "ranks that share a layer")
    tp_grain_size: Count = key(1, "cuts fall on multiples of this")
    mpu: Any = key(None, "object with model-parallel groups; from Python only")
    tp_group: Any = key(None, "process group; from Python only")


class LayerSpecSection(Section):
    """How layers whose name matches are split."""

    patterns: list[str] = key([], "regular expressions on parameter names")
    partition_type: Annotated[Literal["column", "row", "skip"], LOWER] = key("column", "split direction")
    shape: list[Any] | None = key(None, "logical shape of a fused weight")
    partition_dim: Size | None = key(None, "dim that is split")
    model_types: list[str] | None = key(None, "only for these models")
    gather_output: bool = key(False, "gather the output")
    grad_allreduce: bool = key(False, "sum the gradient of the input over ranks")


class PartitionConfigSection(Section):
    """A custom map of layers to splits."""

    use_default_specs: bool = key(True, "add the preset's")
    layer_specs: list[LayerSpecSection] = key([], "the map, first match wins")
    strict_mode: bool = key(False, "a linear layer that matches nothing is an error")
    embedding_partition_dim: Size = key(1, "dim of embeddings that is split")
    lm_head_patterns: list[str] | None = key(None, "names of output heads")
    tp_size: Count | None = key(None, "ranks that share a layer")


class TensorParallelSection(Section):
    """Layers split over ranks."""

    autotp_size: Size = key(0, "ranks that share a layer; 0 and 1: off")
    dtype: DtypeName = key("fp16", "dtype of the split layers")
    tp_overlap_comm: bool = key(False, "overlap the backward all-reduce of column layers")
    tensor_parallel: TensorParallelGroupSection = part(TensorParallelGroupSection, "set by a program")
    injection_policy_tuple: list[str] | None = key(None, "names of row-parallel layers")
    preset_model: (
        Annotated[
            Literal["llama", "bloom", "chatglm", "mixtral", "deepseek_v2", "qwen2", "phi3"],
            LOWER,
        ]
        | None
    ) = key(None, "built-in map for this model family")
    partition_config: PartitionConfigSection | None = key(None, "custom map")
    keep_module_on_host: bool = key(False, "do not move the model to the device")
    replace_with_kernel_inject: bool = key(False, "fused inference kernels")

    aliases: ClassVar = {"tp": "tensor_parallel", "kernel_inject": "replace_with_kernel_inject"}


class ExpertParallelSection(Section):
    """Experts of mixture-of-experts blocks spread over ranks."""

    enabled: bool = key(False, "replace the model's expert blocks")
    autoep_size: Count = key(1, "ranks that share the experts")
    expert_tensor_parallel_size: Count = key(1, "tensor parallelism inside an expert; only 1")
    validate_folding_routing: bool = key(False, "check routing at run time")
    preset_model: (
        Annotated[
            Literal["mixtral", "qwen2_moe", "qwen3_moe", "qwen3_5_moe", "deepseek_v2", "deepseek_v3"],
            LOWER,
        ]
        | None
    ) = key(None, "model family")
    moe_layer_pattern: str | None = key(None, "regular expression on module names")
    expert_pattern: str | None = key(None, "attribute that holds the experts")
    router_pattern: str | None = key(None, "attribute that holds the router")
    use_grouped_mm: bool = key(True, "grouped matrix products")
    disable_triton_grouped_mm: bool = key(False, "without Triton")
    route_norm: bool | None = key(None, "normalise the weights of chosen experts")
    route_scale: Number = key(1.0, "scale of router weights")
    routed_scaling_factor: NumberOrAuto = key("auto", "scale of the experts' sum")
    score_apply: Annotated[Literal["auto", "pre", "post"], LOWER] = key("auto", "when weights are applied")
    combine_impl: Annotated[Literal["auto", "weighted_sum", "legacy_bmm"], LOWER] = key(
        "auto", "how outputs are combined"
    )
    score_func: Annotated[Literal["auto", "softmax", "sigmoid"], LOWER] = key("auto", "router activation")
    top_k: IntegerOrAuto = key("auto", "experts per token")
    num_expert_groups: Count | None = key(None, "groups of experts")
    num_limited_groups: Count | None = key(None, "groups a token may use")
    load_balance_coeff: Number | None = key(None, "not supported; must be null")
    expert_w1: str | None = key(None, "name of the gate weight")
    expert_w2: str | None = key(None, "name of the down weight")
    expert_w3: str | None = key(None, "name of the up weight; null when fused with the gate")
    num_experts_attr: str | None = key(None, "where the model's config counts experts")
    top_k_attr: str | None = key(None, "where the model's config counts experts per token")
    has_shared_experts: bool | None = key(None, "experts that every token uses")
    shared_experts_pattern: str | None = key(None, "attribute that holds them")
    shared_experts_gate_pattern: str | None = key(None, "attribute that holds their gate")


class PipelineSection(Section):
    """Settings of a PipelineModule's engine."""

    stages: IntegerOrAuto = key("auto", "pipe stages; PipelineModule decides")
    partition: str = key("best", "how layers are divided; PipelineModule decides")
    seed_layers: bool = key(False, "a seed per layer; PipelineModule decides")
    activation_checkpoint_interval: Size = key(0, "layers per activation checkpoint; 0: the module's own")
    pipe_partitioned: bool = key(True, "split what is sent between pipe stages over tensor-parallel ranks")
    grad_partitioned: bool = key(True, "the same for gradients; needs pipe_partitioned")
    use_reentrant: bool = key(True, "kind of activation checkpoint")
