"""Every key of the configuration does something, is refused, or is named in a table with the reason."""

import re
from pathlib import Path

import pytest

import deepspeed
from deepspeed.config import load_config
from deepspeed.config.inert import GRANTED, INERT
from deepspeed.config.root import DeepSpeedConfig
from deepspeed.config.tree import keys
from deepspeed.config.unbuilt import TABLE

PACKAGE = Path(deepspeed.__file__).parent

READ = {
    "activation_checkpointing/checkpointing.py": """
        activation_checkpointing.partition_activations activation_checkpointing.cpu_checkpointing
        activation_checkpointing.contiguous_memory_optimization activation_checkpointing.number_checkpoints
        activation_checkpointing.synchronize_checkpoint_boundary activation_checkpointing.profile
    """,
    "config/batch.py": "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps",
    "config/loading.py": "data_parallel_size log_level verbose",
    "config/rules.py": "amp.enabled data_types.param_dtype sparse_gradients",
    "comm/log.py": """
        comms_logger.enabled comms_logger.prof_all comms_logger.prof_ops comms_logger.verbose
        comms_logger.debug
    """,
    "engine/engine.py": "managed_gradient_accumulation",
    "engine/checkpointing.py": """
        checkpoint.tag_validation checkpoint.load_missing checkpoint.load_fallback checkpoint.keep_last
        checkpoint.writer.decoupled checkpoint.save_safetensors
    """,
    "engine/build.py": """
        optimizer.params scheduler.type scheduler.params gradient_clipping prescale_gradients
        gradient_predivide_factor gradient_allreduce_op communication_data_type dataloader_drop_last
        zero_optimization.overlap_comm zero_optimization.ignore_unused_parameters
        fp16.enabled fp16.auto_cast fp16.fp16_master_weights_and_grads
        bf16.enabled bf16.check_grad_overflow bf16.bf16_master_weights_and_grads
        torch_autocast.enabled torch_autocast.dtype torch_autocast.lower_precision_safe_modules
        data_types.grad_accum_dtype data_types.buffer_dtype
    """,
    "engine/accessors.py": "zero_optimization.stage3_gather_16bit_weights_on_model_save",
    "engine/sharding.py": """
        zero_optimization.stage zero_optimization.mics_shard_size zero_optimization.zero_hpz_partition_size
        zero_optimization.reduce_bucket_size zero_optimization.allgather_bucket_size
        zero_optimization.stage3_param_persistence_threshold zero_optimization.stage3_model_persistence_threshold
        zero_optimization.stage3_max_live_parameters zero_optimization.stage3_max_reuse_distance
        zero_optimization.stage3_prefetch_bucket_size zero_optimization.stage3_module_granularity_threshold
        zero_optimization.sub_group_size
    """,
    "engine/offload.py": """
        zero_optimization.offload_optimizer.device zero_optimization.offload_optimizer.nvme_path
        zero_optimization.offload_optimizer.buffer_count zero_optimization.offload_optimizer.pin_memory
        zero_optimization.offload_optimizer.ratio
        aio.block_size aio.queue_depth aio.intra_op_parallelism
    """,
    "zero/holder.py": """
        zero_optimization.offload_param.device zero_optimization.offload_param.nvme_path
        zero_optimization.offload_param.buffer_count zero_optimization.offload_param.max_in_cpu
        zero_optimization.offload_param.pin_memory
    """,
    "zero/leaf_modules.py": """
        zero_optimization.leaf_module.classes zero_optimization.leaf_module.names
        zero_optimization.leaf_module.name_suffixes
    """,
    "engine/features/__init__.py": "steps_per_print wall_clock_breakdown memory_breakdown",
    "engine/initialize.py": "dump_state",
    "engine/optimizers.py": "bf16.bf16_optimizer_states",
    "precision/loss_scaler.py": """
        fp16.loss_scale fp16.initial_scale_power fp16.loss_scale_window fp16.hysteresis
        fp16.consecutive_hysteresis fp16.min_loss_scale
    """,
    "monitor/monitor.py": """
        tensorboard.enabled tensorboard.output_path tensorboard.job_name
        wandb.enabled wandb.group wandb.team wandb.project
        csv_monitor.enabled csv_monitor.output_path csv_monitor.job_name
        comet.enabled comet.samples_log_interval comet.project comet.workspace comet.api_key
        comet.experiment_name comet.experiment_key comet.online comet.mode
    """,
}
"""Where keys are acted on, or held to others (amp and sparse_gradients: refused)."""

ONLY_WITH_AMP = "amp.opt_level"


def test_no_key_is_accepted_and_ignored():
    answered = {
        ONLY_WITH_AMP,
        *INERT,
        *GRANTED,
        *(row.path for row in TABLE),
        *" ".join(READ.values()).split(),
    }
    known = [path for path, _ in keys(DeepSpeedConfig)]
    assert [path for path in known if path not in answered and not any(r.governs(path) for r in TABLE)] == []


@pytest.mark.parametrize("file", READ)
def test_a_key_that_is_acted_on_is_named_where_that_happens(file):
    source = (PACKAGE / file).read_text()
    known = dict(keys(DeepSpeedConfig))
    for path in READ[file].split():
        assert path in known
        assert re.search(rf"\b{path.rpartition('.')[2]}\b", source), path


def test_the_tables_overlap_nowhere_and_name_only_known_keys():
    known = dict(keys(DeepSpeedConfig))
    read = " ".join(READ.values()).split()
    names = [*INERT, *GRANTED, *read]
    assert len(names) == len(set(names))
    assert set(names) <= known.keys()
    assert not {row.path for row in TABLE} & {*names}


OTHER = {
    "aio.thread_count": 2,
    "allgather_size": 2,
    "checkpoint.writer.data_parallel": "REPLICA",
    "checkpoint.writer.io_buffer_size": 1000,
    "checkpoint.writer.io_multiplier": 2,
    "checkpoint.writer.type": "PYTHON",
    "eigenvalue": {"enabled": True},
    "moe": {"enabled": True},
    "pipeline.partition": "uniform",
    "pipeline.stages": 2,
    "vocabulary_size": 50257,
    "zero_optimization.offload_optimizer.cpuadam_cores_perc": 0.5,
    "zero_optimization.offload_param.buffer_size": 1000,
}
"""Of keys that are not true or false: a value that asks for something."""


def tree_with(path, value):
    tree: dict = {"train_batch_size": 1}
    inner = tree
    *sections, name = path.split(".")
    for part in sections:
        inner = inner.setdefault(part, {})
    inner[name] = value
    return tree


@pytest.mark.parametrize("path", INERT)
def test_a_key_without_effect_is_reported_once_and_only_when_it_asks_for_something(path, log):
    default = dict(keys(DeepSpeedConfig))[path].default
    load_config(tree_with(path, default))
    load_config(tree_with(path, "auto"))
    assert log == []
    other = OTHER.get(path, not default)
    for _ in range(2):
        load_config(tree_with(path, other))
    assert len(log) == 1
    assert f"{path} = " in log[0]
    assert INERT[path] in log[0]


def test_keys_without_effect_share_one_line(log):
    zero = {"allgather_partitions": False, "elastic_checkpoint": True, "reduce_scatter": True}
    load_config({"train_batch_size": 8, "zero_optimization": zero, "disable_allgather": True})
    assert len(log) == 1
    assert all(name in log[0] for name in ("allgather_partitions", "elastic_checkpoint", "disable_allgather"))
    assert "reduce_scatter" not in log[0]


def test_an_old_spelling_of_a_section_hides_nothing(log):
    load_config({"train_batch_size": 8, "bfloat16": {"immediate_grad_update": True}})
    assert any("bf16.immediate_grad_update = true" in line for line in log)
