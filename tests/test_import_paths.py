"""Every documented import path leads to its object, and costs nothing until it is used."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import deepspeed
from deepspeed import runtime, utils
from deepspeed.runtime.later import LATER

ROOT = Path(__file__).parent.parent
OLD_PATHS = [(path, name) for path, names in runtime.TABLE.items() for name in names]


@pytest.mark.parametrize(("path", "name"), OLD_PATHS, ids=lambda part: part)
def test_an_old_path_leads_to_its_object(path, name):
    module = importlib.import_module(f"deepspeed.runtime.{path}")
    target, _, other = runtime.TABLE[path][name].partition(":")
    assert getattr(module, name) is getattr(importlib.import_module(target), other or name)
    assert name in module.__all__


@pytest.mark.parametrize("name", utils.__all__)
def test_a_documented_utility_is_there(name):
    assert getattr(utils, name) is not None


WAITING = [(f"deepspeed.runtime.{path}", name) for path, (_, names) in LATER.items() for name in names]


@pytest.mark.parametrize(("path", "name"), WAITING, ids=lambda part: part)
def test_a_name_of_a_later_feature_says_which(path, name):
    with pytest.raises(ImportError, match=rf"{path}\.{name}: .* not built yet"):
        exec(f"from {path} import {name}", {})


def test_a_name_is_there_now_or_later_but_not_both():
    for path, (_, names) in LATER.items():
        assert not {*names} & {*runtime.TABLE.get(path, {})}


TRAINERS = [
    ("deepspeed.runtime.lr_schedules", "VALID_LR_SCHEDULES"),
    ("deepspeed.runtime.base_optimizer", "DeepSpeedOptimizer"),
    ("deepspeed.runtime.engine", "DeepSpeedEngine"),
    ("deepspeed.runtime.utils", "see_memory_usage"),
    ("deepspeed.utils", "groups"),
    ("deepspeed.utils", "logger"),
    ("deepspeed.utils", "is_initialized"),
    ("deepspeed.utils", "safe_get_full_grad"),
    ("deepspeed.utils.logging", "logger"),
    ("deepspeed.utils.tensor_fragment", "safe_get_full_fp32_param"),
    ("deepspeed.utils.zero_to_fp32", "get_fp32_state_dict_from_zero_checkpoint"),
    ("deepspeed.utils.zero_to_fp32", "load_state_dict_from_zero_checkpoint"),
    ("deepspeed.utils.zero_to_fp32", "convert_zero_checkpoint_to_fp32_state_dict"),
    ("deepspeed.comm", "get_rank"),
    ("deepspeed.accelerator", "get_accelerator"),
    ("deepspeed.launcher.runner", "DEEPSPEED_ENVIRONMENT_NAME"),
    ("deepspeed.git_version_info", "version"),
    ("deepspeed.ops.adam", "DeepSpeedCPUAdam"),
    ("deepspeed.ops.adam", "FusedAdam"),
    ("deepspeed.ops.adagrad", "DeepSpeedCPUAdagrad"),
    ("deepspeed.ops.lion", "DeepSpeedCPULion"),
    ("deepspeed.ops.lion", "FusedLion"),
    ("deepspeed.ops.lamb", "FusedLamb"),
    ("deepspeed.monitor.monitor", "MonitorMaster"),
]
"""What transformers, Accelerate, PEFT, TRL and Lightning import for features of this release."""


@pytest.mark.parametrize(("path", "name"), TRAINERS, ids=lambda part: part)
def test_what_trainers_import_is_there(path, name):
    assert getattr(importlib.import_module(path), name) is not None


def test_trainers_reach_old_modules_from_the_top_without_importing_them():
    script = "import deepspeed; assert 'WarmupLR' in deepspeed.runtime.lr_schedules.VALID_LR_SCHEDULES"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=100)


def test_old_modules_are_reached_by_attribute_and_by_every_form_of_import():
    import deepspeed.runtime.pipe.topology as topology
    from deepspeed.runtime.zero import stage_1_and_2

    from deepspeed.runtime import zero

    assert deepspeed.runtime.pipe.topology is topology
    assert zero.stage_1_and_2 is stage_1_and_2
    assert importlib.util.find_spec("deepspeed.runtime.utils") is not None
    scope: dict = {}
    exec("from deepspeed.runtime.utils import *", scope)
    assert scope["move_to_device"] is utils.move_to_device


def test_what_the_table_does_not_have_is_missing_as_anywhere_else():
    with pytest.raises(ImportError):
        importlib.import_module("deepspeed.runtime.no_such_module")
    with pytest.raises(AttributeError, match=r"module 'deepspeed.runtime.utils' has no attribute 'nothing'"):
        _ = deepspeed.runtime.utils.nothing


def test_old_paths_cost_nothing_until_they_are_used():
    script = (
        "import sys, deepspeed.runtime.engine, deepspeed.utils\n"
        "heavy = ('deepspeed.engine', 'deepspeed.zero', 'deepspeed.config')\n"
        "used = [name for name in sys.modules if name.startswith(heavy)]\n"
        "assert used == [], used"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=100)


TRAIN_SAVE_AND_LOAD = """
import sys, deepspeed
from toys import make_toy, toy_batch, toy_loss
from training import config_for
engine, *_ = deepspeed.initialize(model=make_toy(), config=config_for({stage}, "bf16", 1, 1.0))
engine.backward(toy_loss(engine, toy_batch(0, 0, 0)))
engine.step()
engine.save_checkpoint({folder!r})
engine.load_checkpoint({folder!r})
assert engine.global_steps == 1
assert "torch._dynamo" not in sys.modules
"""


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_training_does_not_import_the_compiler(stage, tmp_path):
    script = TRAIN_SAVE_AND_LOAD.format(stage=stage, folder=str(tmp_path))
    subprocess.run([sys.executable, "-c", script], check=True, timeout=100, cwd=Path(__file__).parent)


def test_loggers_are_one_object():
    import logging

    from deepspeed.utils.logging import logger

    assert logger is utils.logger
    assert logger is logging.getLogger("DeepSpeed")


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        (
            "from deepspeed.pipe import PipelineModule",
            "deepspeed.pipe: pipeline parallelism is not built yet",
        ),
        ("import deepspeed.moe.layer", "deepspeed.moe: expert parallelism is not built yet"),
        (
            "from deepspeed.sequence.layer import DistributedAttention",
            "sequence parallelism is not built yet",
        ),
        ("from deepspeed.module_inject.layers import GatherReplacedLayerParams", "tensor parallelism"),
        ("from deepspeed.elasticity import compute_elastic_config", "elasticity is not built yet"),
        ("from deepspeed.compression.compress import init_compression", "compression is not built yet"),
        ("from deepspeed.profiling.flops_profiler import get_model_profile", "the flops profiler is not"),
        ("from deepspeed.inference.config import DeepSpeedInferenceConfig", "inference is not built yet"),
        ("from deepspeed.ops.sparse_attention import SparseSelfAttention", "sparse attention is not built"),
        ("import deepspeed.ops.transformer", "the transformer kernel is not built yet"),
    ],
)
def test_a_module_of_a_later_feature_says_which(statement, reason):
    with pytest.raises(ModuleNotFoundError, match=reason) as caught:
        exec(statement, {})
    assert caught.value.name in deepspeed._LATER_MODULES


@pytest.mark.parametrize("name", deepspeed._LATER_MODULES)
def test_a_module_of_a_later_feature_is_not_there(name):
    assert not ROOT.joinpath(*name.split(".")).exists()
    assert not ROOT.joinpath(*name.split(".")).with_suffix(".py").exists()


def test_what_comes_later_is_named_at_the_door():
    with pytest.raises(AttributeError, match="'PipelineModule'; pipeline parallelism is not built yet"):
        _ = deepspeed.PipelineModule
    assert not hasattr(deepspeed, "init_inference")
