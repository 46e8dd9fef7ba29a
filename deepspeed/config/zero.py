"""``zero_optimization``: what is sharded, how it is communicated, where it lives."""

import sys
from typing import Annotated, Any, ClassVar, Literal

from deepspeed.config.base import (
    LOWER,
    Expects,
    FilePath,
    Fraction,
    Integer,
    IntegerOrAuto,
    Section,
    Size,
    key,
    part,
    to_integer,
)

Device = Annotated[Literal["none", "cpu", "nvme"], LOWER]
Stage = Annotated[Literal[0, 1, 2, 3], Expects("0, 1, 2 or 3", to_integer)]
MOE_BLOCKS = [
    "transformers.models.mixtral.modeling_mixtral.MixtralSparseMoeBlock",
    "transformers.models.qwen2_moe.modeling_qwen2_moe.Qwen2MoeSparseMoeBlock",
    "transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeSparseMoeBlock",
]


class OffloadParamSection(Section):
    """Where stage-3 parameters live between uses."""

    device: Device = key("none", "none, cpu or nvme")
    nvme_path: FilePath | None = key(None, "folder on the NVMe drive; required with nvme")
    buffer_count: Size = key(5, "most buffers that are on their way to the drive; at least 2")
    buffer_size: Size = key(100_000_000, "no effect; buffers are as large as what passes through them")
    max_in_cpu: Size = key(1_000_000_000, "elements that each rank keeps in host memory with nvme")
    pin_memory: bool = key(True, "page-locked host memory")


class OffloadOptimizerSection(Section):
    """Where master weights and optimizer states live, and the update runs."""

    device: Device = key("none", "none, cpu or nvme")
    nvme_path: FilePath | None = key(None, "folder on the NVMe drive; required with nvme")
    buffer_count: Size = key(4, "tiles read ahead or waiting to be written, with nvme")
    pin_memory: bool = key(True, "page-locked host memory")
    pipeline_read: bool = key(False, "read the next tile while this one is updated")
    pipeline_write: bool = key(False, "write the last tile while this one is updated")
    fast_init: bool = key(False, "quicker start with nvme")
    ratio: Fraction = key(1.0, "share of the states that is offloaded")
    super_offload: bool = key(False, "update in a process of its own (stage 3 only)")
    cpuadam_cores_perc: Fraction = key(0.8, "share of the cores for that process")


class ZenFlowSection(Section):
    """Important gradients updated on the device at once, the rest later on the host."""

    topk_ratio: Fraction = key(0.1, "share of gradient columns updated every step")
    select_strategy: Annotated[Literal["auto", "step", "epoch"], LOWER] = key(
        "auto", "how the selection interval is counted"
    )
    select_interval: IntegerOrAuto = key("auto", "steps or epochs between selections")
    update_interval: IntegerOrAuto = key("auto", "steps between updates of the rest")
    overlap_step: bool = key(False, "update the rest while forward and backward run")
    offload: bool = key(False, "offload the states of the selected columns too")
    auto_ratio: Fraction = key(0.99, "threshold of the automatic interval")
    full_warm_up_rounds: Size = key(0, "first rounds that update everything")
    pt_reserved_cores_perc: Fraction = key(0.5, "share of the cores left to PyTorch")
    steps_per_epoch: Size | None = key(None, "filled in by the engine")


class LeafModuleSection(Section):
    """Modules that stage 3 treats as one unit."""

    classes: list[str] = key(MOE_BLOCKS, "by full class name")
    names: list[str] = key([], "by full module name")
    name_suffixes: list[str] = key([], "by the end of the module name")


class LoCoSection(Section):
    """Error feedback of quantised gradients."""

    err_beta: Fraction = key(0.8, "weight of the old error")
    reset_T: Size = key(1024, "steps after which the error is forgotten")


class ZeroSection(Section):
    """Sharding of optimizer states (stage 1), gradients (2) and parameters (3)."""

    stage: Stage = key(0, "0: nothing is sharded; 1, 2, 3: see above")
    contiguous_gradients: bool = key(True, "no effect; gradients of a unit lie in one buffer")
    reduce_scatter: bool = key(True, "no effect; gradients go to the rank that owns them")
    reduce_bucket_size: Size = key(500_000_000, "elements per gradient reduction")
    allgather_bucket_size: Size = key(500_000_000, "bounds units as the key above does")
    overlap_comm: bool | None = key(None, "reduce while backward runs; null: yes")
    load_from_fp32_weights: bool = key(True, "on load, master weights come from the saved fp32 ones")
    offload_param: OffloadParamSection | None = key(None, "where parameters live")
    offload_optimizer: OffloadOptimizerSection | None = key(None, "where optimizer states live")
    zenflow: ZenFlowSection | None = key(None, "decoupled updates")
    sub_group_size: Size = key(1_000_000_000, "elements per tile of the optimizer step; 0: no limit")
    stage3_prefetch_bucket_size: Size = key(50_000_000, "elements gathered ahead of use")
    stage3_param_persistence_threshold: Size = key(100_000, "smaller parameters stay whole")
    stage3_model_persistence_threshold: Size = key(sys.maxsize, "most elements that may stay whole")
    stage3_max_live_parameters: Size = key(1_000_000_000, "most gathered elements at a time")
    stage3_max_reuse_distance: Size = key(1_000_000_000, "keep what is used again within so many elements")
    stage3_gather_16bit_weights_on_model_save: bool = key(False, "save_16bit_model gathers whole weights")
    stage3_module_granularity_threshold: Size = key(0, "modules finer than this are gathered whole")
    stage3_use_all_reduce_for_fetch_params: bool = key(False, "gather by all-reduce")
    stage3_allgather_sequential: bool = key(False, "gather one parameter at a time")
    ignore_unused_parameters: bool = key(True, "false: a parameter without gradient is an error")
    round_robin_gradients: bool = key(False, "no effect; every rank owns an equal part")
    zero_hpz_partition_size: Size = key(1, "ranks that share a second copy of the parameters (hpZ)")
    zero_quantized_weights: bool = key(False, "gather parameters in int8 (qwZ)")
    zero_quantized_nontrainable_weights: bool = key(False, "keep frozen parameters in int8")
    zero_quantized_gradients: bool = key(False, "reduce gradients quantised (qgZ)")
    zeropp_loco_param: LoCoSection | None = key(None, "error feedback for qgZ")
    mics_shard_size: Integer = key(-1, "ranks per shard group; above 0 turns MiCS on")
    mics_hierarchical_params_gather: bool = key(False, "two-level gather across nodes")
    memory_efficient_linear: bool = key(True, "do not save gathered weights for backward")
    pipeline_loading_checkpoint: bool = key(False, "ranks load one after another, to save host memory")
    override_module_apply: bool = key(True, "zero.Init gathers parameters for Module.apply")
    log_trace_cache_warnings: bool = key(False, "no effect; there is no recorded order")
    enable_sanity_checks: bool = key(False, "no effect; what costs nothing is always checked")
    save_muon_momentum_buffer_in_memory: bool = key(False, "with nvme, do not swap Muon's momentum")
    leaf_module: LeafModuleSection = part(LeafModuleSection, "modules treated as one unit")
    allgather_partitions: bool = key(True, "no effect; updated parameters are gathered in one collective")
    cpu_offload_use_pin_memory: bool | None = key(None, "no effect; offload_optimizer.pin_memory decides")
    elastic_checkpoint: bool = key(False, "no effect; every checkpoint loads at any world size")
    grad_hooks: bool = key(True, "no effect; gradients are reduced from hooks")
    use_multi_rank_bucket_allreduce: bool = key(True, "no effect; a unit is one collective")

    aliases: ClassVar[dict[str, Any]] = {
        name.removeprefix("stage3_"): name
        for name in (
            "stage3_prefetch_bucket_size",
            "stage3_param_persistence_threshold",
            "stage3_model_persistence_threshold",
            "stage3_max_live_parameters",
            "stage3_max_reuse_distance",
            "stage3_gather_16bit_weights_on_model_save",
            "stage3_module_granularity_threshold",
            "stage3_use_all_reduce_for_fetch_params",
            "stage3_allgather_sequential",
        )
    }
