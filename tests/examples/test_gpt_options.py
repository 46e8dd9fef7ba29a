"""The command line of the example: what wins over what, and one sentence for what cannot be used."""

from __future__ import annotations

import json

import gpt_example  # noqa: F401
import pytest
from gpt.errors import UserError
from gpt.model import Shape
from gpt.options import deepspeed_config, model_shape, parse
from gpt.weights import write_shape


def test_heads_follow_the_width():
    assert model_shape(parse([])) == Shape(layers=4, dim=192, heads=3, seq=256)
    assert model_shape(parse(["--layers", "48", "--dim", "1600"])).heads == 25
    assert model_shape(parse(["--dim", "32"])).heads == 1


def test_time_is_limited_unless_steps_are_asked_for():
    assert (parse([]).steps, parse([]).minutes) == (800, 4)
    assert parse(["--steps", "9"]).minutes is None
    assert parse(["--minutes", "1.5"]).minutes == 1.5


def test_weights_to_start_from_bring_their_sizes(tmp_path):
    shape = Shape(layers=2, dim=64, heads=1, seq=32)
    weights = tmp_path / "model.safetensors"
    weights.touch()
    write_shape(tmp_path, shape)
    assert model_shape(parse(["--init-from", str(weights)])) == shape
    with pytest.raises(UserError, match=r"--dim: .* has 64, got 32; leave --dim out"):
        model_shape(parse(["--init-from", str(weights), "--dim", "32"]))


def test_the_schedule_gets_the_number_of_steps():
    params = deepspeed_config(parse(["--steps", "50"]))["scheduler"]["params"]
    assert params["total_num_steps"] == 50
    assert params["warmup_num_steps"] == 10


def test_flags_win_over_the_file(tmp_path):
    file = tmp_path / "config.json"
    file.write_text('{"train_batch_size": 64, // a comment\n "optimizer": {"type": "Adam"}}')
    config = deepspeed_config(parse(["--deepspeed_config", str(file), "--batch", "3", "--lr", "0.5"]))
    assert config == {
        "train_micro_batch_size_per_gpu": 3,
        "optimizer": {"type": "Adam", "params": {"lr": 0.5}},
    }


def test_without_flags_the_file_stands(tmp_path):
    file = tmp_path / "config.json"
    written = {
        "train_batch_size": 64,
        "optimizer": {"type": "Adam"},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 3}},
    }
    file.write_text(json.dumps(written))
    assert deepspeed_config(parse(["--deepspeed_config", str(file)])) == written


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--steps", "0"], "--steps: expected a number above 0, got 0"),
        (["--lr", "nan"], "--lr: expected a number above 0, got nan"),
        (["--sample-bytes", "-1"], "--sample-bytes: expected a number above 0, got -1"),
        (["--layers", "x"], "argument --layers: invalid int value: 'x'; --help lists what there is"),
        (["--stepz", "1"], "unrecognized arguments: --stepz 1; --help lists what there is"),
        (["--dim", "100", "--heads", "3"], "--dim: expected a multiple of twice --heads (6), got 100"),
        (["--init-from", "none"], "--init-from: none does not exist"),
    ],
)
def test_what_cannot_be_used_is_named_in_one_sentence(arguments, sentence):
    with pytest.raises(UserError) as raised:
        model_shape(parse(arguments))
    assert sentence in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_configuration_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match=r"--deepspeed_config: .* cannot be read: No such file"):
        deepspeed_config(parse(["--deepspeed_config", str(tmp_path / "none.json")]))
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        deepspeed_config(parse(["--deepspeed_config", str(broken)]))
    broken.write_text("[1]")
    with pytest.raises(UserError, match="must hold one JSON object"):
        deepspeed_config(parse(["--deepspeed_config", str(broken)]))
    broken.write_text('{"train_batch_size": 8}')
    with pytest.raises(UserError, match="has no section optimizer"):
        deepspeed_config(parse(["--deepspeed_config", str(broken)]))
