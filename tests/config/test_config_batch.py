"""train_batch_size = micro-batch x accumulation steps x ranks, however it is asked for."""

import pytest

from deepspeed.config import BatchSizes, load_config
from deepspeed.config.batch import solve
from deepspeed.errors import ConfigError

A = "auto"


@pytest.mark.parametrize(
    ("given", "dp", "expected"),
    [
        ((32, 4, 2), 4, (32, 4, 2)),
        ((32, 4, None), 4, (32, 4, 2)),
        ((32, None, 2), 4, (32, 4, 2)),
        ((None, 4, 2), 4, (32, 4, 2)),
        ((32, None, None), 4, (32, 8, 1)),
        ((None, 4, None), 4, (16, 4, 1)),
        ((32, A, A), 2, (32, 16, 1)),
        ((A, 4, 2), 1, (8, 4, 2)),
        ((A, 4, A), 3, (12, 4, 1)),
        ((32, A, 2), 1, (32, 16, 2)),
        ((A, A, 2), 2, (None, None, 2)),
        ((A, None, None), 2, (None, None, 1)),
        ((None, A, None), 2, (None, None, 1)),
        ((A, A, A), 2, (None, None, 1)),
    ],
)
def test_what_is_missing_is_derived(given, dp, expected):
    assert solve(*given, dp) == BatchSizes(*expected, dp)


def test_sizes_left_open_are_filled_from_the_data():
    assert solve(A, A, 2, 3).complete(micro=5) == BatchSizes(30, 5, 2, 3)
    assert solve(8, A, A, 1).complete(micro=5) == BatchSizes(8, 8, 1, 1)


def test_without_any_size_the_keys_that_would_do_are_named():
    for gas in (None, 4):
        with pytest.raises(ConfigError, match="Either train_batch_size or train_micro_batch_size_per_gpu"):
            solve(None, None, gas, 1)


def test_a_wrong_product_shows_numbers_sources_and_two_ways_out():
    with pytest.raises(ConfigError) as caught:
        load_config(
            {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
        )
    text = str(caught.value)
    assert text.startswith("train_batch_size: expected")
    for piece in (
        "train_batch_size = 16 (user)",
        "train_micro_batch_size_per_gpu = 1 (user)",
        "gradient_accumulation_steps = 1 (user)",
        "ranks = 1 (seen)",
        "nearest valid: train_batch_size = 1 or gradient_accumulation_steps = 16",
        "only 1 rank was seen; was the job started with a launcher?",
    ):
        assert piece in text


@pytest.mark.parametrize(
    ("given", "dp", "ways"),
    [
        ((33, 4, None), 4, ["train_batch_size = 32", "train_batch_size = 48"]),
        ((2, None, None), 4, ["train_batch_size = 4", "train_batch_size = 8"]),
        ((10, None, 2), 3, ["train_batch_size = 6", "train_batch_size = 12"]),
        ((24, 5, 2), 3, ["train_batch_size = 30", "train_micro_batch_size_per_gpu = 4"]),
        (
            (25, 5, 2),
            3,
            ["train_batch_size = 30", "train_batch_size = 45 with gradient_accumulation_steps = 3"],
        ),
    ],
)
def test_the_ways_out_are_valid_settings(given, dp, ways):
    with pytest.raises(ConfigError) as caught:
        solve(*given, dp)
    assert f"nearest valid: {' or '.join(ways)}" in str(caught.value)
    assert "launcher" not in str(caught.value)
    for way in ways:
        changed = dict(
            zip(
                ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
                given,
                strict=True,
            )
        )
        for part in way.split(" with "):
            name, _, value = part.partition(" = ")
            changed[name] = int(value)
        solve(*changed.values(), dp)


def test_a_new_train_batch_changes_the_accumulation_steps():
    sizes = BatchSizes(32, 4, 2, 4)
    assert sizes.with_train(64) == BatchSizes(64, 4, 4, 4)
    with pytest.raises(ConfigError, match=r"train_batch_size = 32 or train_batch_size = 48"):
        sizes.with_train(40)


def test_a_new_micro_batch_changes_the_train_batch():
    assert BatchSizes(32, 4, 2, 4).with_micro(1) == BatchSizes(8, 1, 2, 4)


@pytest.mark.parametrize("value", [0, -4, 2.5, True])
def test_a_size_that_is_no_positive_integer_is_refused(value):
    with pytest.raises(ConfigError, match="expected an integer of at least 1"):
        BatchSizes(32, 4, 2, 4).with_train(value)
    with pytest.raises(ConfigError, match="expected an integer of at least 1"):
        BatchSizes(32, 4, 2, 4).with_micro(value)


def test_the_solved_sizes_stand_in_the_tree_with_their_source():
    config = load_config({"train_batch_size": 8, "train_micro_batch_size_per_gpu": "auto"}, world_size=2)
    assert config.batch == BatchSizes(8, 4, 1, 2)
    assert (config.train_micro_batch_size_per_gpu, config.gradient_accumulation_steps) == (4, 1)
    assert config.source_of("train_micro_batch_size_per_gpu") == "auto: from the other batch sizes"
    assert config.source_of("gradient_accumulation_steps") == "from the other batch sizes"
    assert config.unresolved() == []


def test_auto_waits_for_the_loader_and_is_reported_once(log):
    config = load_config({"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto"}, world_size=2)
    assert config.batch == BatchSizes(None, None, 1, 2)
    assert config.unresolved() == ["train_batch_size", "train_micro_batch_size_per_gpu"]
    assert config.complete_batch(4, "batch size of the loader") == BatchSizes(8, 4, 1, 2)
    assert (config.train_batch_size, config.unresolved()) == (8, [])
    config.announce_resolutions()
    config.announce_resolutions()
    assert len(log) == 1
    assert "train_micro_batch_size_per_gpu = 4 (batch size of the loader)" in log[0]


def test_sequence_parallel_ranks_do_not_count():
    config = load_config(
        {"train_batch_size": 8, "sequence_parallel_size": 2}, world_size=4, refuse_unbuilt=False
    )
    assert config.batch.dp == 2
