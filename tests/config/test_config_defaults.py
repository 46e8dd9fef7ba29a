"""Defaults are those users of the original rely on; the table was written from its documentation of facts."""

import sys

import pytest

from deepspeed.config import DeepSpeedConfig, load_config
from deepspeed.config.base import Section
from deepspeed.config.tree import keys, lookup, shape

DEFAULTS = {
    "managed_gradient_accumulation": True,
    "steps_per_print": None,
    "gradient_clipping": 1.0,
    "prescale_gradients": False,
    "gradient_predivide_factor": 1.0,
    "gradient_allreduce_op": "mean",
    "communication_data_type": None,
    "seq_parallel_communication_data_type": "fp32",
    "sparse_gradients": False,
    "dump_state": False,
    "wall_clock_breakdown": False,
    "memory_breakdown": False,
    "zero_allow_untested_optimizer": False,
    "zero_force_ds_cpu_optimizer": True,
    "dataloader_drop_last": False,
    "use_data_before_expert_parallelism": False,
    "graph_harvesting": False,
    "log_level": None,
    "optimizer": None,
    "scheduler": None,
    "weight_quantization": None,
    "datastates_ckpt": False,
    "fp16.enabled": False,
    "fp16.auto_cast": False,
    "fp16.loss_scale": 0,
    "fp16.initial_scale_power": 16,
    "fp16.loss_scale_window": 1000,
    "fp16.hysteresis": 2,
    "fp16.consecutive_hysteresis": False,
    "fp16.min_loss_scale": 1,
    "fp16.fp16_master_weights_and_grads": False,
    "bf16.enabled": False,
    "bf16.immediate_grad_update": False,
    "bf16.check_grad_overflow": True,
    "bf16.bf16_master_weights_and_grads": False,
    "bf16.bf16_optimizer_states": False,
    "torch_autocast.enabled": False,
    "torch_autocast.dtype": None,
    "torch_autocast.lower_precision_safe_modules": None,
    "data_types.grad_accum_dtype": None,
    "data_types.param_dtype": None,
    "data_types.buffer_dtype": None,
    "zero_optimization.stage": 0,
    "zero_optimization.contiguous_gradients": True,
    "zero_optimization.reduce_scatter": True,
    "zero_optimization.reduce_bucket_size": 500_000_000,
    "zero_optimization.allgather_bucket_size": 500_000_000,
    "zero_optimization.overlap_comm": None,
    "zero_optimization.load_from_fp32_weights": True,
    "zero_optimization.offload_param": None,
    "zero_optimization.offload_optimizer": None,
    "zero_optimization.zenflow": None,
    "zero_optimization.sub_group_size": 1_000_000_000,
    "zero_optimization.stage3_prefetch_bucket_size": 50_000_000,
    "zero_optimization.stage3_param_persistence_threshold": 100_000,
    "zero_optimization.stage3_model_persistence_threshold": sys.maxsize,
    "zero_optimization.stage3_max_live_parameters": 1_000_000_000,
    "zero_optimization.stage3_max_reuse_distance": 1_000_000_000,
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": False,
    "zero_optimization.stage3_module_granularity_threshold": 0,
    "zero_optimization.stage3_use_all_reduce_for_fetch_params": False,
    "zero_optimization.stage3_allgather_sequential": False,
    "zero_optimization.ignore_unused_parameters": True,
    "zero_optimization.round_robin_gradients": False,
    "zero_optimization.zero_hpz_partition_size": 1,
    "zero_optimization.zero_quantized_weights": False,
    "zero_optimization.zero_quantized_nontrainable_weights": False,
    "zero_optimization.zero_quantized_gradients": False,
    "zero_optimization.zeropp_loco_param": None,
    "zero_optimization.mics_shard_size": -1,
    "zero_optimization.mics_hierarchical_params_gather": False,
    "zero_optimization.memory_efficient_linear": True,
    "zero_optimization.pipeline_loading_checkpoint": False,
    "zero_optimization.override_module_apply": True,
    "comms_logger.enabled": False,
    "comms_logger.prof_all": True,
    "comms_logger.prof_ops": [],
    "tensorboard.output_path": "",
    "tensorboard.job_name": "DeepSpeedJobName",
    "wandb.project": "deepspeed",
    "csv_monitor.job_name": "DeepSpeedJobName",
    "comet.samples_log_interval": 100,
    "flops_profiler.recompute_fwd_factor": 0.0,
    "flops_profiler.profile_step": 1,
    "flops_profiler.module_depth": -1,
    "flops_profiler.top_modules": 1,
    "flops_profiler.detailed": True,
    "timers.throughput.enabled": True,
    "timers.throughput.synchronized": True,
    "checkpoint.tag_validation": "warn",
    "checkpoint.load_universal": False,
    "checkpoint.load_missing": "warn",
    "checkpoint.load_fallback": False,
    "checkpoint.use_node_local_storage": False,
    "checkpoint.parallel_write.pipeline_stage": False,
    "checkpoint.checkpoint_serialization": True,
    "checkpoint.writer": None,
    "tensor_parallel.autotp_size": 0,
    "expert_parallel.autoep_size": 1,
    "expert_parallel.use_grouped_mm": True,
    "pipeline.activation_checkpoint_interval": 0,
    "pipeline.use_reentrant": True,
    "compile.deepcompile": False,
    "compile.free_activation_threshold": 10_485_760,
    "compile.double_buffer": True,
    "aio.block_size": 1_048_576,
    "aio.queue_depth": 8,
    "aio.intra_op_parallelism": 1,
    "aio.overlap_events": True,
    "hybrid_engine.max_out_tokens": 512,
    "hybrid_engine.pin_parameters": True,
    "hybrid_engine.tp_gather_partition_size": 8,
    "data_efficiency.seed": 1234,
    "data_efficiency.data_sampling.num_epochs": 1000,
    "compression_training.activation_quantization.shared_parameters.range_calibration": "dynamic",
    "compression_training.activation_quantization.shared_parameters.schedule_offset": 1000,
    "compression_training.sparse_pruning.shared_parameters.dense_ratio": 0.1,
    "compression_training.head_pruning.shared_parameters.method": "topk",
    "autotuning.fast": True,
    "autotuning.overwrite": True,
    "autotuning.tuner_type": "gridsearch",
    "autotuning.max_train_micro_batch_size_per_gpu": 1024,
    "elasticity.max_train_batch_size": 2000,
    "elasticity.micro_batch_sizes": [2, 4, 6],
    "elasticity.max_gpus": 10000,
    "elasticity.version": 0.2,
    "quantize_training.eigenvalue.max_iter": 100,
}

INSIDE = {
    "zero_optimization.offload_param": {
        "device": "none",
        "nvme_path": None,
        "buffer_count": 5,
        "buffer_size": 100_000_000,
        "max_in_cpu": 1_000_000_000,
        "pin_memory": True,
    },
    "zero_optimization.offload_optimizer": {
        "device": "none",
        "nvme_path": None,
        "buffer_count": 4,
        "pin_memory": True,
        "pipeline_read": False,
        "pipeline_write": False,
        "fast_init": False,
        "ratio": 1.0,
        "super_offload": False,
        "cpuadam_cores_perc": 0.8,
    },
    "zero_optimization.zenflow": {
        "topk_ratio": 0.1,
        "select_strategy": "auto",
        "select_interval": "auto",
        "update_interval": "auto",
        "overlap_step": False,
        "offload": False,
        "auto_ratio": 0.99,
        "full_warm_up_rounds": 0,
        "pt_reserved_cores_perc": 0.5,
        "steps_per_epoch": None,
    },
    "sparse_attention": {"mode": "fixed", "block": 16, "num_local_blocks": 4, "local_window_blocks": [4]},
    "checkpoint.writer": {"type": "FAST", "io_buffer_size": 67_108_864, "io_buffer_double": True},
}


@pytest.fixture(scope="module")
def bare():
    return load_config({"train_batch_size": 1})


@pytest.mark.parametrize("path", DEFAULTS)
def test_a_key_that_is_not_given_has_its_documented_default(bare, path):
    assert lookup(bare, path) == DEFAULTS[path]
    assert bare.source_of(path) == "default"


@pytest.mark.parametrize("path", INSIDE)
def test_an_empty_optional_section_has_its_documented_defaults(path):
    tree: dict = {}
    inner = tree
    for name in path.split("."):
        inner[name] = {}
        inner = inner[name]
    section = lookup(load_config({"train_batch_size": 1, **tree}, refuse_unbuilt=False), path)
    assert {name: getattr(section, name) for name in INSIDE[path]} == INSIDE[path]


def test_the_tables_above_name_only_known_keys():
    known = {path for path, _ in keys(DeepSpeedConfig)} | set(INSIDE)
    sections = {"optimizer", "scheduler", "weight_quantization", "zero_optimization.zeropp_loco_param"}
    assert set(DEFAULTS) - known - sections == set()


def _sections(section: type[Section]) -> set[type[Section]]:
    inner = {shape(declared.annotation)[1] for declared in section.model_fields.values()} - {None}
    return {section}.union(*(_sections(one) for one in inner))


def test_every_key_says_what_it_means():
    for section in _sections(DeepSpeedConfig):
        for name, declared in section.model_fields.items():
            assert declared.description, f"{section.__name__}.{name}"
