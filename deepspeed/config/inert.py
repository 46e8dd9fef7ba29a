"""Keys that are checked and then change nothing, and why: the table behind "never accepted and ignored"."""

from __future__ import annotations

from deepspeed.common.logging import warn_once
from deepspeed.config.base import shown
from deepspeed.config.root import DeepSpeedConfig
from deepspeed.config.tree import lookup

ZERO = "zero_optimization"
INERT = {
    "aio.overlap_events": "a thread that has finished a piece always takes the next",
    "aio.single_submit": "every piece is a system call of its own",
    "aio.thread_count": "aio.intra_op_parallelism sets the threads",
    "allgather_size": "belonged to the boolean zero_optimization",
    "bf16.immediate_grad_update": "gradients are added to their sum once their unit is complete",
    "checkpoint.load_universal": "every checkpoint loads at any world size, stage and precision",
    "checkpoint.use_node_local_storage": "a checkpoint is one folder that every rank reaches",
    "checkpoint.writer.data_parallel": "every rank writes its own part",
    "checkpoint.writer.io_buffer_double": "what is written is in memory already",
    "checkpoint.writer.io_buffer_size": "what is written is in memory already",
    "checkpoint.writer.io_multiplier": "every rank writes with a few threads",
    "checkpoint.writer.show_statistics": "the log says how long a save took",
    "checkpoint.writer.type": "there is one way to write, the fastest",
    "data_efficiency.data_routing.enabled": "random_ltd.enabled decides",
    "data_efficiency.data_sampling.enabled": "curriculum_learning.enabled decides",
    "data_efficiency.enabled": "its parts decide",
    "disable_allgather": "updated parameters are always gathered",
    "eigenvalue": "only quantize_training.eigenvalue was read",
    "moe": "experts are configured in Python",
    "optimizer.legacy_fusion": "there is one fused Adam",
    "pipeline.partition": "an argument of PipelineModule decides",
    "pipeline.seed_layers": "an argument of PipelineModule decides",
    "pipeline.stages": "an argument of PipelineModule decides",
    "timers.throughput.enabled": "samples per second are a by-product of progress lines and monitors",
    "timers.throughput.synchronized": "reading the loss waits for the device anyway",
    "vocabulary_size": "never needed",
    f"{ZERO}.allgather_partitions": "updated parameters are always gathered in one collective",
    f"{ZERO}.contiguous_gradients": "gradients of a unit always lie in one buffer",
    f"{ZERO}.cpu_offload_use_pin_memory": "offload_optimizer.pin_memory decides",
    f"{ZERO}.elastic_checkpoint": "every checkpoint loads at any world size",
    f"{ZERO}.enable_sanity_checks": "the checks that cost nothing are always on",
    f"{ZERO}.grad_hooks": "gradients are always reduced from hooks",
    f"{ZERO}.log_trace_cache_warnings": "there is no trace that a changed order could invalidate",
    f"{ZERO}.memory_efficient_linear": "gathered weights are never kept for backward",
    f"{ZERO}.mics_hierarchical_params_gather": "the shards of a group are gathered in one step",
    f"{ZERO}.offload_optimizer.cpuadam_cores_perc": "the update uses all cores of the rank",
    f"{ZERO}.offload_optimizer.fast_init": "states are made by the first update",
    f"{ZERO}.offload_optimizer.pipeline_read": "the next tile is always read while one is updated",
    f"{ZERO}.offload_optimizer.pipeline_write": "a tile is always written while the next is updated",
    f"{ZERO}.offload_optimizer.super_offload": "gradients always leave during backward and units return one by one",
    f"{ZERO}.offload_param.buffer_size": "weights are read into their place, and buffers are as large as what passes",
    f"{ZERO}.override_module_apply": "what changes parameters in zero.Init always sees them whole",
    f"{ZERO}.pipeline_loading_checkpoint": "a rank reads only what it keeps, block by block",
    f"{ZERO}.reduce_scatter": "gradients only ever go to the rank that owns them",
    f"{ZERO}.round_robin_gradients": "every rank owns an equal part of every unit",
    f"{ZERO}.save_muon_momentum_buffer_in_memory": "all states of a leaf travel together",
    f"{ZERO}.stage3_allgather_sequential": "a unit is gathered straight into place, without a bucket to save",
    f"{ZERO}.stage3_use_all_reduce_for_fetch_params": "shards are of equal size, so an all-gather always fits",
    f"{ZERO}.use_multi_rank_bucket_allreduce": "a unit is always one collective",
}
"""A value other than the default is reported once."""

GRANTED = {
    "zero_allow_untested_optimizer": "every optimizer is tried out when the engine is made",
    "zero_force_ds_cpu_optimizer": "any optimizer that can be sharded may be offloaded",
}
"""What these ask for is always the case; there is nothing to report."""


STAGE_3_ONLY = (f"{ZERO}.stage3_", f"{ZERO}.leaf_module.", f"{ZERO}.mics_", f"{ZERO}.zero_hpz_")
"""What keys begin with that matter where parameters are sharded; templates carry them at every stage."""


def report_inert(config: DeepSpeedConfig) -> None:
    """Warn once of the inert keys that the user has set to something else than their default."""
    lines = []
    for path, reason in INERT.items():
        if not config.source_of(path).startswith("user"):
            continue
        section, _, name = path.rpartition(".")
        owner = lookup(config, section) if section else config
        value = getattr(owner, name)
        if value != type(owner).model_fields[name].default:
            lines.append(f"{path} = {shown(value)} ({reason})")
    zero = config.zero_optimization
    if zero.stage < 3 and zero.offload_param is not None and zero.offload_param.device == "cpu":
        lines.append(
            f'{ZERO}.offload_param.device = "cpu" (below stage 3 parameters stay whole on the device)'
        )
    if lines:
        warn_once(f"configuration keys without effect: {'; '.join(lines)}")
