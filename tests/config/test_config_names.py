"""A misspelt key at any depth is an error that names the right one; other tools' keys are left alone."""

import string

import pytest

from deepspeed.config import DeepSpeedConfig, load_config
from deepspeed.config.names import distance, resembling
from deepspeed.config.tree import Findings, keys, read, shape
from deepspeed.errors import ConfigError


def sections(section=DeepSpeedConfig, path=()):
    """Yield every section with the way to it; a map's key is ``g``."""
    yield path, section
    for name, declared in section.model_fields.items():
        kind, inner = shape(declared.annotation)
        if inner is not None:
            yield from sections(inner, (*path, name, *{"map": ("g",), "list": (0,)}.get(kind, ())))


def mutations(word):
    """Yield misspellings by one letter: changed, added, dropped, swapped."""
    for i, letter in enumerate(word):
        other = string.ascii_lowercase[(ord(letter) + 7 * i) % 26]
        yield word[:i] + other + word[i + 1 :]
        yield word[:i] + other + word[i:]
        yield word[:i] + word[i + 1 :]
        yield word[:i] + word[i + 1 : i + 2] + letter + word[i + 2 :]


def nested(path, leaf):
    """Return ``leaf`` under `path`, as a tree."""
    for step in reversed(path):
        leaf = [leaf] if step == 0 else {step: leaf}
    return leaf


ALL = [(path, section) for path, section in sections() if not section.open_ended]


@pytest.mark.parametrize(("path", "section"), ALL, ids=[".".join(map(str, path)) or "top" for path, _ in ALL])
def test_a_key_wrong_by_one_letter_is_named_with_the_right_one(path, section):
    known = {*section.model_fields, *section.aliases}
    for name in known:
        for wrong in set(mutations(name)) - known:
            if not wrong or wrong == "moe":
                continue
            found = Findings()
            read(DeepSpeedConfig, nested(path, {wrong: 1}), found)
            (line,) = found.errors
            assert f'got "{wrong}"' in line
            assert f"'{name}'" in line.partition("did you mean")[2], (name, line)


def test_the_path_of_a_misspelt_key_is_shown():
    with pytest.raises(
        ConfigError, match=r"^zero_optimization\.offload_param\.divice: .*did you mean 'device'"
    ):
        load_config({"train_batch_size": 1, "zero_optimization": {"offload_param": {"divice": "cpu"}}})


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("zero_optimisation", "zero_optimization"),
        ("zero_optimizer", "zero_optimization"),
        ("train_micro_batch_size", "train_micro_batch_size_per_gpu"),
        ("gradient_clip", "gradient_clipping"),
        ("optimiser", "optimizer"),
        ("gradient_accumulation_step", "gradient_accumulation_steps"),
        ("Train_Batch_Size", "train_batch_size"),
        ("BF16", "bf16"),
        ("activation_checkpoint", "activation_checkpointing"),
    ],
)
def test_common_mistakes_at_the_top_are_named(wrong, right):
    with pytest.raises(ConfigError, match=f"{wrong}: .*'{right}'"):
        load_config({"train_batch_size": 1, wrong: 1})


OTHERS = [
    "_comment",
    "_comment_zero_optimization",
    "//",
    "$schema",
    "comment",
    "comments",
    "description",
    "comms_config",
    "monitor_config",
    "msamp",
    "name",
    "seed",
    "local_rank",
    "deepspeed_version",
    "zero_optimization.reduce_bucket_size",
    "lr",
    "model",
    "wandb_project",
    "logging_batch_size_per_gpu",
]


@pytest.mark.parametrize("name", OTHERS)
def test_other_tools_keys_are_tolerated_and_named_once(name, log):
    for _ in range(2):
        load_config({"train_batch_size": 1, name: {"anything": True}})
    assert log == [f"configuration keys taken for another tool's: {name}"]


def test_a_key_outside_of_its_section_is_told_where_it_would_count(log):
    load_config({"train_batch_size": 1, "offload_param": {"device": "cpu"}, "stage3_max_live_parameters": 5})
    assert log == [
        "configuration keys taken for another tool's: "
        "offload_param (here it would count: zero_optimization.offload_param), "
        "stage3_max_live_parameters (here it would count: zero_optimization.stage3_max_live_parameters)"
    ]


def test_no_known_key_is_another_tools():
    for name in DeepSpeedConfig.model_fields:
        assert name in resembling(name, DeepSpeedConfig.model_fields)


def test_distance_counts_single_letter_mistakes():
    assert distance("stage", "stage") == 0
    for wrong in ("stag", "stages", "stale", "satge"):
        assert distance(wrong, "stage") == 1
    assert distance("", "abc") == 3


def test_every_section_is_covered():
    assert len(ALL) > 60
    assert len(list(keys(DeepSpeedConfig))) > 350
