"""The model, the sampling and the weights of the example."""

from __future__ import annotations

import gpt_example  # noqa: F401
import pytest
import torch
from gpt.errors import UserError
from gpt.model import GPT, Shape
from gpt.sample import generate
from gpt.weights import load_weights, read_shape, write_shape
from safetensors.torch import save_file

SHAPE = Shape(layers=2, dim=32, heads=2, seq=16)


def model(seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    return GPT(SHAPE)


def test_a_byte_sees_only_what_comes_before_it():
    tokens = torch.randint(0, 256, (1, 16))
    changed = tokens.clone()
    changed[0, 10] = (changed[0, 10] + 1) % 256
    before, after = model()(tokens), model()(changed)
    assert torch.equal(before[:, :10], after[:, :10])
    assert not torch.allclose(before[:, 10:], after[:, 10:])


def test_positions_count():
    logits = model()(torch.tensor([[1, 2, 3, 1, 2]]))
    assert not torch.allclose(logits[0, 0], logits[0, 3])


def test_loss_is_the_mean_surprise_of_the_targets():
    tokens, targets = torch.randint(0, 256, (2, 3, 16))
    logits = model()(tokens)
    expected = -logits.log_softmax(-1).gather(-1, targets[..., None]).mean()
    assert torch.allclose(model()(tokens, targets), expected)


def test_gpt2_xl_has_its_one_and_a_half_billion_weights():
    with torch.device("meta"):
        large = GPT(Shape(layers=48, dim=1600, heads=25, seq=1024))
    assert sum(param.numel() for param in large.parameters()) == pytest.approx(1.47e9, rel=0.01)


def sample(**changes: object) -> str:
    options = {"count": 20, "seq": 16, "temperature": 1.0, "seed": 0, "device": torch.device("cpu")}
    return generate(model(), "def ", **{**options, **changes})


def test_a_sample_starts_with_its_prompt_and_repeats_with_its_seed():
    assert sample().startswith("def ")
    assert sample() == sample()
    assert sample() != sample(seed=1)


def test_a_sample_holds_nothing_a_terminal_would_obey():
    assert all(each.isprintable() or each in "\n\t" for each in sample(count=200))


def test_a_cold_sample_takes_the_likeliest_byte():
    expected = model()(torch.tensor([list(b"def ")]))[0, -1].argmax()
    text = sample(count=1, temperature=1e-4)
    assert text[4:] in (chr(int(expected)), "\N{REPLACEMENT CHARACTER}")


def test_weights_come_back(tmp_path):
    weights = tmp_path / "model.safetensors"
    save_file(model().state_dict(), weights)
    write_shape(tmp_path, SHAPE)
    other = GPT(read_shape(weights))
    load_weights(other, weights)
    tokens = torch.randint(0, 256, (1, 16))
    assert torch.equal(other(tokens), model()(tokens))


def test_weights_of_another_model_are_refused(tmp_path):
    weights = tmp_path / "model.safetensors"
    save_file({"x": torch.zeros(1)}, weights)
    with pytest.raises(UserError, match="does not fit the model"):
        load_weights(model(), weights)


def test_weights_without_their_sizes_are_refused(tmp_path):
    weights = tmp_path / "model.safetensors"
    with pytest.raises(UserError, match=r"model\.safetensors does not exist"):
        read_shape(weights)
    weights.touch()
    with pytest.raises(UserError, match=r"model\.json does not exist"):
        read_shape(weights)
    (tmp_path / "model.json").write_text('{"layers": 1}')
    with pytest.raises(UserError, match="does not describe a model"):
        read_shape(weights)
