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
RULES = ("auto", "batch", "loading", "rules")

DORMANT = (
    "activation_checkpointing.",
    "aio.",
    "amp.opt_level",
    "checkpoint.",
    "compile.",
    "compression_training.",
    "curriculum_learning.",
    "data_efficiency.",
    "pipeline.",
    "seq_parallel_communication_data_type",
    "sparse_attention.",
    "tensor_parallel.",
    "zero_optimization.leaf_module.",
    "zero_optimization.memory_efficient_linear",
    "zero_optimization.mics_hierarchical_params_gather",
    "zero_optimization.override_module_apply",
    "zero_optimization.pipeline_loading_checkpoint",
    "zero_optimization.save_muon_momentum_buffer_in_memory",
    "zero_optimization.stage3_",
    "zero_optimization.sub_group_size",
    "zero_optimization.zenflow.",
    "zero_optimization.zeropp_loco_param.",
)
"""Details of features whose own key is refused while they are not built."""


def sources():
    """What reads keys: the package below the configuration, and the rules between keys."""
    below = [path for path in PACKAGE.rglob("*.py") if "config" not in path.relative_to(PACKAGE).parts]
    return "\n".join(
        path.read_text() for path in [*below, *(PACKAGE / f"config/{name}.py" for name in RULES)]
    )


def test_no_key_is_accepted_and_ignored():
    text = sources()
    refused = {row.path for row in TABLE}
    sections = {path.rpartition(".")[0] for path in refused if path.endswith((".enabled", ".device"))}
    ignored = []
    for path, _ in keys(DeepSpeedConfig):
        name = path.rpartition(".")[2]
        named = path in refused or path in INERT or path in GRANTED or path.startswith(DORMANT)
        inside_refused = any(path.startswith(f"{section}.") for section in sections)
        if not (named or inside_refused or re.search(rf"(\.|\"){re.escape(name)}\b", text)):
            ignored.append(path)
    assert ignored == []


@pytest.mark.parametrize("path", INERT)
def test_a_key_without_effect_is_reported_when_it_asks_for_something(path, log):
    section, _, name = path.rpartition(".")
    declared = dict(keys(DeepSpeedConfig))[path]
    for value in (declared.default, not declared.default):
        tree: dict = {}
        inner = tree
        for part in section.split("."):
            inner = inner.setdefault(part, {})
        inner[name] = value
        load_config({"train_batch_size": 1, **tree})
        load_config({"train_batch_size": 1, **tree})
    assert [line for line in log if path in line] == [log[-1]]
    assert INERT[path] in log[-1]
