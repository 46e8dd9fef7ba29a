"""A wrong configuration is refused with the key's path, what was expected, what was given and a way out."""

import pytest

from deepspeed.config import load_config
from deepspeed.errors import ConfigError, NotBuiltError

ZERO, STAGE2 = "zero_optimization", {"stage": 2}
NVME = {"device": "nvme"}
GROUP = {"shared_parameters": {"enabled": True}}

# (tree, the pieces its error must show: path, expectation, value, way out)
WRONG_VALUES = [
    ({ZERO: {"stage": 4}}, [f"{ZERO}.stage: expected 0, 1, 2 or 3, got 4"]),
    ({ZERO: {"stage": "two"}}, [f"{ZERO}.stage: expected 0, 1, 2 or 3", 'got "two"']),
    ({ZERO: {"stage": True}}, [f"{ZERO}.stage: expected 0, 1, 2 or 3, got true"]),
    ({ZERO: {"stage": 1.5}}, [f"{ZERO}.stage: expected 0, 1, 2 or 3, got 1.5"]),
    ({ZERO: 2}, [f"{ZERO}: expected an object, got 2"]),
    ({ZERO: "auto"}, [f"{ZERO}: expected an object", 'got "auto"']),
    ({ZERO: [1]}, [f"{ZERO}: expected an object, got [1]"]),
    (
        {ZERO: {"reduce_bucket_size": -1}},
        [f"{ZERO}.reduce_bucket_size: expected an integer of at least 0, got -1"],
    ),
    ({ZERO: {"reduce_bucket_size": 0.5}}, ["reduce_bucket_size: expected an integer of at least 0, got 0.5"]),
    (
        {ZERO: {"reduce_bucket_size": "big"}},
        ['reduce_bucket_size: expected an integer of at least 0, got "big"'],
    ),
    (
        {ZERO: {"sub_group_size": float("nan")}},
        ["sub_group_size: expected an integer of at least 0, got NaN"],
    ),
    ({ZERO: {"max_live_parameters": -5}}, [f"{ZERO}.max_live_parameters: expected an integer", "got -5"]),
    ({ZERO: {"overlap_comm": "often"}}, [f'{ZERO}.overlap_comm: expected true or false, got "often"']),
    (
        {ZERO: {"contiguous_gradients": None}},
        [f"{ZERO}.contiguous_gradients: expected true or false, got null"],
    ),
    ({ZERO: {"offload_optimizer": "cpu"}}, [f'{ZERO}.offload_optimizer: expected an object, got "cpu"']),
    (
        {ZERO: {"offload_param": {"device": "gpu"}}},
        [f"{ZERO}.offload_param.device: expected", '"none", "cpu" or "nvme"', 'got "gpu"'],
    ),
    (
        {ZERO: {"offload_optimizer": {"ratio": 1.5}}},
        ["offload_optimizer.ratio: expected a number from 0 to 1"],
    ),
    (
        {ZERO: {"zenflow": {"select_interval": "often"}}},
        ["zenflow.select_interval: expected an integer or", '"often"'],
    ),
    (
        {ZERO: {"leaf_module": {"classes": "Block"}}},
        [f'{ZERO}.leaf_module.classes: expected a list, got "Block"'],
    ),
    ({"train_batch_size": 0}, ["train_batch_size: expected an integer of at least 1, got 0"]),
    ({"train_batch_size": -8}, ["train_batch_size: expected an integer of at least 1, got -8"]),
    ({"train_batch_size": [8]}, ["train_batch_size: expected an integer of at least 1, got [8]"]),
    (
        {"train_micro_batch_size_per_gpu": "four"},
        ["train_micro_batch_size_per_gpu: expected an integer", '"four"'],
    ),
    (
        {"gradient_accumulation_steps": 0},
        ["gradient_accumulation_steps: expected an integer of at least 1, got 0"],
    ),
    ({"gradient_clipping": -1}, ["gradient_clipping: expected a number of at least 0, got -1"]),
    ({"gradient_clipping": True}, ["gradient_clipping: expected a number of at least 0, got true"]),
    ({"gradient_predivide_factor": 0}, ["gradient_predivide_factor: expected a number above 0, got 0"]),
    ({"gradient_allreduce_op": "max"}, ['gradient_allreduce_op: expected "mean" or "sum", got "max"']),
    (
        {"communication_data_type": "fp8"},
        ['communication_data_type: expected "fp16", "bf16" or "fp32", got "fp8"'],
    ),
    (
        {"data_types": {"grad_accum_dtype": 16}},
        ['data_types.grad_accum_dtype: expected "fp16", "bf16" or', "got 16"],
    ),
    (
        {"torch_autocast": {"dtype": "int8"}},
        ['torch_autocast.dtype: expected "fp16", "bf16" or "fp32", got "int8"'],
    ),
    (
        {"steps_per_print": -1},
        ["steps_per_print: expected an integer of at least 0, infinity or null, got -1"],
    ),
    ({"log_level": "loud"}, ["log_level: expected", '"debug"', 'got "loud"']),
    ({"fp16": {"enabled": "maybe"}}, ['fp16.enabled: expected true or false, got "maybe"']),
    ({"fp16": {"loss_scale": -2}}, ["fp16.loss_scale: expected a number of at least 0, got -2"]),
    (
        {"fp16": {"loss_scale": float("inf")}},
        ["fp16.loss_scale: expected a number of at least 0, got Infinity"],
    ),
    ({"fp16": {"loss_scale": True}}, ["fp16.loss_scale: expected a number of at least 0, got true"]),
    ({"fp16": True}, ["fp16: expected an object, got true"]),
    ({"optimizer": "Adam"}, ['optimizer: expected an object, got "Adam"']),
    ({"optimizer": {"type": 3}}, ["optimizer.type: expected a string, got 3"]),
    ({"optimizer": {"type": "Adam", "params": [1]}}, ["optimizer.params: expected an object, got [1]"]),
    ({"comms_logger": {"prof_ops": "all"}}, ['comms_logger.prof_ops: expected a list, got "all"']),
    ({"comms_logger": {"prof_ops": [1]}}, ["comms_logger.prof_ops[0]: expected a string, got 1"]),
    ({"tensorboard": {"output_path": 3}}, ["tensorboard.output_path: expected a path, got 3"]),
    (
        {"checkpoint": {"tag_validation": "maybe"}},
        ['checkpoint.tag_validation: expected "ignore", "warn" or "fail"'],
    ),
    (
        {"elasticity": {"micro_batch_sizes": [2, 0]}},
        ["elasticity.micro_batch_sizes[1]: expected an integer", "got 0"],
    ),
    (
        {"compression_training": {"weight_quantization": {"different_groups": {"a": {"params": {}}}}}},
        ["compression_training.weight_quantization.different_groups.a.params.start_bits: expected a value"],
    ),
    (
        {"tensor_parallel": {"partition_config": {"layer_specs": [{"partition_type": "diagonal"}]}}},
        ["tensor_parallel.partition_config.layer_specs[0].partition_type: expected", '"diagonal"'],
    ),
    (
        {"weight_quantization": {"quantized_initialization": {"num_bits": 6}}},
        ["num_bits: expected 4 or 8, got 6"],
    ),
]

CONFLICTS = [
    (
        {"fp16": {"enabled": True}, "bf16": {"enabled": True}},
        ["fp16.enabled: expected false beside bf16.enabled, got true for both", "turn one of them off"],
    ),
    (
        {"bf16": {"enabled": True, "bf16_optimizer_states": True, "bf16_master_weights_and_grads": False}},
        ["bf16.bf16_optimizer_states: expected bf16.bf16_master_weights_and_grads to be true", "got false"],
    ),
    (
        {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}},
        ["bf16.bf16_master_weights_and_grads: expected false at stage 0, got true", f"set {ZERO}.stage"],
    ),
    (
        {"fp16": {"enabled": True, "fp16_master_weights_and_grads": True}},
        ["fp16.fp16_master_weights_and_grads: expected false at stage 0, got true", f"set {ZERO}.stage"],
    ),
    (
        {"fp16": {"enabled": True, "min_loss_scale": 0}},
        ["fp16.min_loss_scale: expected a number above 0 with a dynamic loss scale, got 0"],
    ),
    (
        {"fp16": {"enabled": True, "initial_scale_power": 128}},
        [
            "fp16.initial_scale_power: expected at most 127, above which the scale is infinite in fp32, got 128"
        ],
    ),
    (
        {"fp16": {"enabled": True, "loss_scale_window": 0}},
        ["fp16.loss_scale_window: expected a number above 0 with a dynamic loss scale, got 0"],
    ),
    (
        {"bf16": {"enabled": True}, "data_types": {"param_dtype": "fp16"}},
        ['data_types.param_dtype: expected "bf16"', 'got "fp16"', "remove the key"],
    ),
    (
        {"amp": {"enabled": True, "opt_level": "O2"}},
        ["amp.enabled: expected false, got true", "torch_autocast"],
    ),
    ({"sparse_gradients": True}, ["sparse_gradients: expected false, got true", "flat buffer", "remove"]),
    (
        {"optimizer": {"type": "Lamb", "params": {"max_grad_norm": 1.0}}},
        ["optimizer.params.max_grad_norm: expected it absent, got 1.0", "gradient_clipping"],
    ),
    ({"optimizer": {"params": {"lr": 1}}}, ["optimizer.type: expected a name, got nothing", "add it"]),
    ({"scheduler": {"type": "auto"}}, ["scheduler.type: expected a name, got auto", "add it"]),
    (
        {"gradient_allreduce_op": "SUM", ZERO: {"stage": 3}},
        ["gradient_allreduce_op: expected", f"with {ZERO}.stage 3", 'got "sum"', "remove one"],
    ),
    (
        {ZERO: {"stage": 3, "offload_param": NVME}},
        [f"{ZERO}.offload_param.nvme_path: expected a folder", "got null", "add the path"],
    ),
    (
        {ZERO: {"stage": 3, "offload_optimizer": {**NVME, "nvme_path": ""}}},
        [f"{ZERO}.offload_optimizer.nvme_path: expected a folder", 'got ""', "add the path"],
    ),
    (
        {ZERO: {"zenflow": {"select_strategy": "auto", "select_interval": 3}}},
        ["zenflow.select_interval: expected", "got 3", "set select_strategy"],
    ),
    (
        {"activation_checkpointing": {"contiguous_memory_optimization": True}},
        ["activation_checkpointing.number_checkpoints: expected a number", "got null", "add it"],
    ),
    (
        {"compile": {"passes": ["z1", "autotp"]}},
        ['compile.passes: expected autotp alone, got ["z1", "autotp"]', "remove the others"],
    ),
    (
        {"compile": {"offload_activation": True, "offload_parameters": True}},
        ["compile.offload_parameters: expected false", "got true", "turn one off"],
    ),
    (
        {"elasticity": {"enabled": True, "max_train_batch_size": 8, "micro_batch_sizes": [2]}},
        ["train_batch_size: expected it absent with elasticity.enabled, got 8", "remove it"],
    ),
    ({"elasticity": {"min_gpus": 9, "max_gpus": 3}}, ["elasticity.min_gpus: expected at most", "(3), got 9"]),
    (
        {"curriculum_learning": {"enabled": True}},
        ["curriculum_learning.min_difficulty: expected a value because curriculum_learning.enabled is true"],
    ),
    (
        {"compression_training": {"row_pruning": GROUP}},
        [
            "compression_training.row_pruning.different_groups: expected at least one group",
            "got nothing",
            "add one",
        ],
    ),
    ({ZERO: {"legacy_stage1": True}}, [f"{ZERO}.legacy_stage1: expected false, got true", "remove the key"]),
    (
        {ZERO: {"cpu_offload": True, "offload_optimizer": {"device": "cpu"}}},
        [f"{ZERO}.cpu_offload: expected it absent beside {ZERO}.offload_optimizer, got true", "remove"],
    ),
    (
        {ZERO: {"prefetch_bucket_size": 1, "stage3_prefetch_bucket_size": 1}},
        ["stage3_prefetch_bucket_size: expected once", "remove one"],
    ),
    ({"data_parallel_size": 2}, ["data_parallel_size: expected 1 (1 ranks", "got 2"]),
    ({"sequence_parallel_size": 2}, ["sequence_parallel_size", "got 2"]),
]


@pytest.mark.parametrize(("tree", "pieces"), WRONG_VALUES + CONFLICTS)
def test_a_wrong_configuration_is_explained(tree, pieces):
    with pytest.raises(ConfigError) as caught:
        load_config({"train_batch_size": 8, **tree})
    for piece in pieces:
        assert piece in str(caught.value)


def test_every_wrong_key_has_its_line():
    with pytest.raises(ConfigError) as caught:
        load_config({"fp16": {"enabled": 7, "histeresis": 1}, ZERO: {"stage": 9}, "gradient_cliping": 1})
    lines = str(caught.value).splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "fp16.histeresis",
        "gradient_cliping",
        f"{ZERO}.stage",
        "fp16.enabled",
    ]


def test_the_error_speaks_of_the_key_as_the_user_wrote_it():
    with pytest.raises(ConfigError, match=r"^bfloat16\.enabled: expected true or false"):
        load_config({"train_batch_size": 8, "bfloat16": {"enabled": "x"}})


UNBUILT = [
    ({ZERO: {"zenflow": {}}}, f"{ZERO}.zenflow: "),
    ({ZERO: {"zero_quantized_gradients": True}}, f"{ZERO}.zero_quantized_gradients: "),
    ({"optimizer": {"type": "OneBitAdam"}}, "optimizer.type: "),
    ({"flops_profiler": {"enabled": True}}, "flops_profiler.enabled: "),
    ({"checkpoint": {"checkpoint_serialization": False}}, "checkpoint.checkpoint_serialization: "),
    ({"nebula": {"enabled": True}}, "nebula.enabled: "),
    ({"datastates_ckpt": {}}, "datastates_ckpt: "),
    ({"datastates_ckpt": None}, "datastates_ckpt: "),
    ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel.autotp_size: "),
    ({"expert_parallel": {"enabled": True}}, "expert_parallel.enabled: "),
    ({"pipeline": {"activation_checkpoint_interval": 1}}, "pipeline.activation_checkpoint_interval: "),
    ({"compile": {"deepcompile": True}}, "compile.deepcompile: "),
    ({"compile": {"passes": ["z3"]}}, "compile.passes: "),
    ({"hybrid_engine": {"enabled": True}}, "hybrid_engine.enabled: "),
    ({"weight_quantization": {}}, "weight_quantization.enabled: "),
    ({"progressive_layer_drop": {"enabled": True}}, "progressive_layer_drop.enabled: "),
    (
        {"compression_training": {"layer_reduction": {"enabled": True}}},
        "compression_training.layer_reduction",
    ),
    ({"quantize_training": {"eigenvalue": {"enabled": True}}}, "quantize_training.eigenvalue.enabled: "),
    ({"autotuning": {"enabled": True}}, "autotuning.enabled: "),
    ({"sparse_attention": {"mode": "bigbird"}}, "sparse_attention.mode: "),
    ({"sequence_parallel_size": 2}, "sequence_parallel_size: "),
    ({"graph_harvesting": True}, "graph_harvesting: "),
]


@pytest.mark.parametrize(("tree", "path"), UNBUILT)
def test_a_feature_of_a_later_release_is_refused_by_name(tree, path, log):
    tree = {"train_batch_size": 8, **tree}
    with pytest.raises(NotBuiltError, match="is not built yet, got") as caught:
        load_config(tree, world_size=2)
    assert str(caught.value).startswith(path)
    load_config(tree, world_size=2, refuse_unbuilt=False)


def test_sections_that_are_off_are_harmless(log):
    off = {
        "activation_checkpointing": {
            "partition_activations": False,
            "cpu_checkpointing": False,
            "contiguous_memory_optimization": False,
            "synchronize_checkpoint_boundary": False,
        },
        "aio": {
            "block_size": 1048576,
            "queue_depth": 8,
            "single_submit": False,
            "overlap_events": True,
            "thread_count": 1,
        },
        "flops_profiler": {"enabled": False, "profile_step": 5},
        "tensor_parallel": {"autotp_size": 1},
        "hybrid_engine": {"enabled": False},
        "elasticity": {"enabled": False},
        "compile": {"deepcompile": False},
        "amp": {"enabled": False, "anything": 1},
        "datastates_ckpt": False,
        "compression_training": {"weight_quantization": {"shared_parameters": {"enabled": False}}},
        "zero_optimization": {
            "stage": 2,
            "offload_optimizer": {"device": "none", "nvme_path": None},
            "offload_param": None,
            "stage3_max_live_parameters": 1e9,
            "stage3_prefetch_bucket_size": "auto",
            "stage3_gather_16bit_weights_on_model_save": True,
            "zero_quantized_weights": False,
            "zero_hpz_partition_size": 1,
        },
        "sequence_parallel_size": 1,
        "data_parallel_size": 2,
    }
    assert load_config({"train_batch_size": 8, **off}, world_size=2).zero_optimization.stage == 2
