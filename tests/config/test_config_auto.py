""" "auto" is legal for every key, is resolved by us, and each resolution is told once with its reason."""

import pytest

from deepspeed.config import DeepSpeedConfig, load_config, resolve_from_model, resolve_scheduler
from deepspeed.config.tree import keys, lookup
from deepspeed.errors import ConfigError

ZERO = "zero_optimization"
SIZES = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")


def load(**tree):
    return load_config({"train_batch_size": 8, **tree}, refuse_unbuilt=False)


def literal(declared):
    return declared.default == "auto"


LEAVES = [
    path
    for path, declared in keys(DeepSpeedConfig)
    if "<name>" not in path and "[]" not in path and not literal(declared) and not declared.is_required()
]


@pytest.mark.parametrize("path", LEAVES)
def test_auto_is_accepted_for_every_key_and_settled_by_the_model(path, log):
    tree: dict = {}
    inner = tree
    *sections, name = path.split(".")
    for section in sections:
        inner[section] = inner = {}
    inner[name] = "auto"
    if path.startswith(("optimizer.type", "scheduler.type")):
        with pytest.raises(ConfigError, match=f"{path}: expected a name, got auto"):
            load(**tree)
        return
    config = load_config({"train_micro_batch_size_per_gpu": 2, **tree}, refuse_unbuilt=False)
    assert config.auto_paths() == [path]
    assert config.is_auto(path)
    resolve_from_model(config, hidden_size=64, total_numel=10**6)
    assert config.unresolved() in ([], ["train_micro_batch_size_per_gpu"])


def test_sizes_follow_the_width_of_the_model():
    config = load(zero_optimization=dict.fromkeys(SIZES, "auto"))
    assert config.zero_optimization.reduce_bucket_size == 500_000_000
    resolve_from_model(config, hidden_size=4096, total_numel=10**9)
    zero = config.zero_optimization
    assert [getattr(zero, name) for name in SIZES] == [4096 * 4096, int(0.9 * 4096 * 4096), 40960]
    assert config.source_of(f"{ZERO}.reduce_bucket_size") == "auto: model width 4096"


def test_without_a_width_sizes_keep_their_defaults():
    config = load(zero_optimization=dict.fromkeys(SIZES, "auto"))
    resolve_from_model(config, hidden_size=None, total_numel=10**10)
    assert [getattr(config.zero_optimization, name) for name in SIZES] == [500_000_000, 50_000_000, 100_000]
    assert config.unresolved() == []


@pytest.mark.parametrize(
    ("tree", "supported", "expected"),
    [
        ({"bf16": {"enabled": "auto"}}, True, (False, True)),
        ({"bf16": {"enabled": "auto"}}, False, (False, False)),
        ({"fp16": {"enabled": "auto"}, "bf16": {"enabled": "auto"}}, True, (False, True)),
        ({"fp16": {"enabled": "auto"}, "bf16": {"enabled": "auto"}}, False, (False, False)),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": "auto"}}, True, (True, False)),
        ({"fp16": {"enabled": "auto"}, "bf16": {"enabled": True}}, True, (False, True)),
        ({"bf16": {"enabled": "auto"}, "torch_autocast": {"enabled": True}}, True, (False, False)),
    ],
)
def test_precision_follows_the_device(tree, supported, expected):
    config = load_config({"train_batch_size": 8, **tree}, bf16_supported=supported)
    assert (config.fp16.enabled, config.bf16.enabled) == expected
    assert config.unresolved() == []


def test_arguments_of_the_optimizer_are_left_to_it():
    config = load(optimizer={"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto", "eps": 1e-6}})
    assert config.optimizer.params == {"eps": 1e-6}
    resolve_from_model(config, hidden_size=None, total_numel=1)
    assert config.optimizer.params == {"eps": 1e-6}
    assert config.source_of("optimizer.params.lr") == "auto: the optimizer's own"


def test_gradient_clipping_becomes_its_default():
    config = load(gradient_clipping="auto")
    resolve_from_model(config, hidden_size=None, total_numel=1)
    assert (config.gradient_clipping, config.source_of("gradient_clipping")) == (1.0, "auto: default")


def test_the_scheduler_takes_the_optimizers_lr():
    names = ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps")
    config = load(scheduler={"type": "WarmupLR", "params": dict.fromkeys(names, "auto")})
    resolve_from_model(config, hidden_size=None, total_numel=1)
    assert config.unresolved() == [f"scheduler.params.{name}" for name in names]
    resolve_scheduler(config, optimizer_lr=3e-4)
    assert config.scheduler.params == {"warmup_min_lr": 0.0, "warmup_max_lr": 3e-4}
    assert config.unresolved() == []


@pytest.mark.parametrize("name", ["total_num_steps", "cycle_max_lr"])
def test_what_cannot_be_inferred_is_named_with_what_is_missing(name):
    config = load(scheduler={"type": "WarmupDecayLR", "params": {name: "auto"}})
    with pytest.raises(
        ConfigError, match=rf"scheduler.params.{name}: expected a number, got \"auto\".* is missing"
    ):
        resolve_scheduler(config, optimizer_lr=1e-3)


def test_every_resolution_is_told_once_in_one_line(log):
    config = load(bf16={"enabled": "auto"}, optimizer={"type": "Adam", "params": {"lr": "auto"}})
    config.announce_resolutions()
    resolve_from_model(config, hidden_size=None, total_numel=1)
    config.announce_resolutions()
    config.announce_resolutions()
    assert log == [
        '"auto" in the configuration: bf16.enabled = true (the device has bf16)',
        '"auto" in the configuration: optimizer.params.lr left out (the optimizer\'s own)',
    ]


def test_a_resolution_is_validated():
    config = load(zero_optimization={"reduce_bucket_size": "auto"}, gradient_clipping="auto")
    with pytest.raises(ConfigError, match=rf"^{ZERO}.reduce_bucket_size: expected an integer"):
        config.resolve_auto(f"{ZERO}.reduce_bucket_size", -1, "test")
    config.resolve_auto("gradient_clipping", "0.5", "test")
    assert lookup(config, "gradient_clipping") == 0.5
    with pytest.raises(ConfigError, match='prescale_gradients: expected "auto" in the configuration'):
        config.resolve_auto("prescale_gradients", True, "test")


def test_keys_whose_own_value_is_auto_keep_it():
    config = load(expert_parallel={"top_k": "auto", "score_func": "auto"})
    assert config.auto_paths() == []
    assert config.expert_parallel.top_k == "auto"
