"""Every accepted form of a configuration gives the same tree, and the caller's own object is left alone."""

import base64
import copy
import json
import logging
import types
from pathlib import Path

import pytest

from deepspeed.common.logging import logger
from deepspeed.config import load_config
from deepspeed.errors import ConfigError

SAMPLES = Path(__file__).parent / "samples"
TREE = {"train_batch_size": 8, "zero_optimization": {"stage": 2, "reduce_bucket_size": 1e9}}


@pytest.fixture
def write(tmp_path):
    def written(text):
        path = tmp_path / "ds.json"
        path.write_text(text)
        return path

    return written


def test_dict_path_string_and_base64_give_the_same_tree(write):
    path = write(json.dumps(TREE))
    encoded = base64.urlsafe_b64encode(json.dumps(TREE).encode()).decode()
    for source in (TREE, types.MappingProxyType(TREE), path, str(path), encoded):
        assert load_config(source) == load_config(TREE)


def test_comments_trailing_commas_and_unquoted_keys_are_accepted(write):
    config = load_config(
        write('{ # ranks\n // two\n "train_batch_size": 8,\n zero_optimization: {"stage": 1,}, }')
    )
    assert (config.train_batch_size, config.zero_optimization.stage) == (8, 1)


@pytest.mark.parametrize(
    "text", ['{"steps_per_print": 1, "steps_per_print": 2}', '{"fp16": {"enabled": true, "enabled": false}}']
)
def test_a_key_that_stands_twice_is_named(write, text):
    with pytest.raises(ConfigError, match=r"(steps_per_print|enabled): expected each key once"):
        load_config(write(text))


def test_duplicates_are_found_in_base64_too():
    with pytest.raises(ConfigError, match="duplicate keys"):
        load_config(base64.urlsafe_b64encode(b'{"a": 1, "a": 2}').decode())


@pytest.mark.parametrize("source", [None, 3, ["a"], "missing.json", ""])
def test_what_is_no_configuration_is_refused_with_the_accepted_forms(source):
    with pytest.raises(ConfigError, match=r"config: expected .*(dict|file)"):
        load_config(source)


@pytest.mark.parametrize(
    "text",
    ["{", "[1]", "", "{'a'}", '{"a": 1e999}', f'{{"a": {"9" * 5000}}}', '{"a":' * 2000 + "1" + "}" * 2000],
)
def test_a_broken_file_is_named(write, text):
    path = write(text)
    with pytest.raises(ConfigError, match=path.name):
        load_config(path)


def test_a_folder_and_a_binary_file_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="folder"):
        load_config(tmp_path)
    (tmp_path / "x").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_config(tmp_path / "x")


def test_raw_is_the_callers_dict_and_is_never_changed():
    tree = {
        "train_batch_size": 8,
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": (0.9, 0.95)}},
        "zero_optimization": {"stage": 1, "cpu_offload": False, "allgather_partitions": True},
        "fp16": {"enabled": "auto"},
    }
    before = copy.deepcopy(tree)
    config = load_config(tree)
    assert config.raw is tree
    assert tree == before
    config.optimizer.params["lr"] = 1.0
    config.zero_optimization.leaf_module.names.append("x")
    assert tree == before
    assert load_config(tree).zero_optimization.leaf_module.names == []


def test_raw_of_a_file_is_its_tree(write):
    assert load_config(write(json.dumps(TREE))).raw == TREE


TODAY = {"simple_fp16.json": 0, "zero2.json": 2}
TRAINERS = {
    "lightning": {
        "train_micro_batch_size_per_gpu": 1,
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
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": 2,
            "contiguous_gradients": True,
            "overlap_comm": True,
            "allgather_partitions": True,
            "reduce_scatter": True,
            "allgather_bucket_size": 200_000_000,
            "reduce_bucket_size": 200_000_000,
            "sub_group_size": 1_000_000_000_000,
        },
    },
    "accelerate": {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "steps_per_print": float("inf"),
        "zero_force_ds_cpu_optimizer": False,
        "fp16": {"enabled": True, "auto_cast": True},
        "bf16": {"enabled": False},
        "checkpoint": {"use_node_local_storage": False},
        "zero_optimization": {
            "stage": 2,
            "offload_optimizer": {"device": "none", "nvme_path": None},
            "offload_param": {"device": "none", "nvme_path": None},
            "stage3_gather_16bit_weights_on_model_save": False,
            "round_robin_gradients": False,
            "load_from_fp32_weights": True,
            "stage3_max_live_parameters": "auto",
        },
    },
}
"""What trainers write into every configuration."""


@pytest.mark.parametrize("name", TRAINERS)
def test_what_trainers_always_write_gives_no_warning(name, log):
    load_config(TRAINERS[name])
    assert log == []


OFFLOADING = ("zero3_offload.json", "zero3_offload_auto.json")


@pytest.mark.parametrize("name", OFFLOADING)
def test_tutorial_files_that_offload_load_as_they_are(name):
    config = load_config(SAMPLES / name)
    zero = config.zero_optimization
    assert (zero.offload_optimizer.device, zero.offload_param.device) == ("cpu", "cpu")
    assert zero.sub_group_size == 10**9
    assert zero.stage3_gather_16bit_weights_on_model_save


def test_every_tutorial_file_is_tried():
    assert {path.name for path in SAMPLES.iterdir()} == {*TODAY, *OFFLOADING}


@pytest.mark.parametrize("name", TODAY)
def test_tutorial_files_load_as_they_are_and_without_a_warning(name, log):
    config = load_config(SAMPLES / name)
    assert config.batch.train == 32
    assert config.zero_optimization.stage == TODAY[name]
    assert log == []


def test_verbose_raises_the_log_level_and_log_level_wins(log):
    load_config({"train_batch_size": 1, "verbose": True})
    assert logger.level == logging.INFO
    load_config({"train_batch_size": 1, "verbose": True, "log_level": "ERROR"})
    assert logger.level == logging.ERROR


def test_numbers_and_booleans_are_lenient_about_their_spelling():
    config = load_config(
        {
            "train_batch_size": "8",
            "steps_per_print": float("inf"),
            "gradient_clipping": "0.5",
            "wall_clock_breakdown": "true",
            "prescale_gradients": 1,
            "zero_optimization": {"stage": 2.0, "reduce_bucket_size": "1e6", "allgather_bucket_size": 2e8},
            "communication_data_type": "torch.bfloat16",
            "checkpoint": {"tag_validation": "FAIL"},
        }
    )
    assert config.train_batch_size == 8
    assert config.steps_per_print is None
    assert config.gradient_clipping == 0.5
    assert config.wall_clock_breakdown is True
    assert config.prescale_gradients is True
    assert config.zero_optimization.stage == 2
    assert config.zero_optimization.reduce_bucket_size == 10**6
    assert isinstance(config.zero_optimization.allgather_bucket_size, int)
    assert config.communication_data_type == "bf16"
    assert config.checkpoint.tag_validation == "fail"


def test_setting_an_attribute_is_checked_too():
    config = load_config(TREE)
    with pytest.raises(ConfigError, match="stage: expected 0, 1, 2 or 3, got 7"):
        config.zero_optimization.stage = 7
    config.zero_optimization.stage = 1
    assert config.zero_optimization.stage == 1


def test_unprefixed_names_of_stage_3_keys_are_the_same_keys():
    config = load_config({"train_batch_size": 8, "zero_optimization": {"prefetch_bucket_size": 7}})
    assert config.zero_optimization.stage3_prefetch_bucket_size == 7
    path = "zero_optimization.stage3_prefetch_bucket_size"
    assert config.source_of(path) == "user (as zero_optimization.prefetch_bucket_size)"
