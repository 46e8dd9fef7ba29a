"""TiledLinear: a linear layer in tiles is the whole one, and stage 3 gathers no more than a tile of it."""

from __future__ import annotations

import pytest
import torch
from harness import on_ranks
from torch import nn

import deepspeed
from deepspeed.errors import ConfigError, UsageError
from deepspeed.zero.access import safe_get_full_fp32_param
from deepspeed.zero.gathered import GatheredParameters
from deepspeed.zero.init import Init
from deepspeed.zero.tiling import TiledLinear, TiledLinearReturnBias

SPLITS = [(1, 1), (2, 1), (1, 3), (3, 2), (7, 5)]  # of 7 inputs and 5 outputs


def whole_linear(bias: bool = True, seed: int = 0) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(7, 5, bias=bias)


def weight_gradient(tiled: TiledLinear) -> torch.Tensor:
    return torch.cat([torch.cat([tile.weight.grad for tile in row], dim=1) for row in tiled.linears])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("in_splits", "out_splits"), SPLITS)
def test_result_and_gradients_are_those_of_the_whole_layer(in_splits, out_splits, bias):
    whole = whole_linear(bias)
    tiled = TiledLinear(7, 5, bias=bias, in_splits=in_splits, out_splits=out_splits, init_linear=whole)
    mine, theirs = (
        torch.randn(2, 3, 7, generator=torch.manual_seed(1), requires_grad=True) for _ in range(2)
    )
    output, expected = tiled(mine), whole(theirs)
    torch.testing.assert_close(output, expected)
    output.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad)
    torch.testing.assert_close(weight_gradient(tiled), whole.weight.grad)
    if bias:
        gradient = torch.cat([row[-1].bias.grad for row in tiled.linears])
        torch.testing.assert_close(gradient, whole.bias.grad)


def test_tiles_hold_exactly_the_parameters_of_the_whole_layer():
    tiled = TiledLinear(7, 5, in_splits=3, out_splits=2)
    assert tiled.in_parts == [0, 3, 5, 7]
    assert tiled.out_parts == [0, 3, 5]
    assert sum(param.numel() for param in tiled.parameters()) == 7 * 5 + 5
    assert [tuple(tile.weight.shape) for row in tiled.linears for tile in row] == [
        (3, 3),
        (3, 2),
        (3, 2),
        (2, 3),
        (2, 2),
        (2, 2),
    ]


def test_initial_values_have_the_scale_of_the_whole_layer():
    bound = 4096**-0.5
    for param in TiledLinear(4096, 8, in_splits=16).parameters():
        assert param.abs().max() <= bound
        assert param.abs().max() > 0.5 * bound


def test_input_may_come_split_and_output_stay_split():
    whole = whole_linear()
    tiled = TiledLinear(
        7,
        5,
        in_splits=2,
        out_splits=2,
        input_is_already_split=True,
        combine_out_splits=False,
        init_linear=whole,
    )
    x = torch.randn(3, 7)
    outputs = tiled(x.split([4, 3], dim=-1))
    assert [output.shape[-1] for output in outputs] == [3, 2]
    torch.testing.assert_close(torch.cat(outputs, dim=-1), whole(x))


class ReturnsBias(nn.Linear):
    """A layer that leaves adding its bias to the caller; it knows one more argument."""

    def __init__(self, rows: int, cols: int, bias: bool = True, *, gain: float) -> None:
        super().__init__(rows, cols, bias=bias)
        self.gain = gain

    def forward(self, x):
        return nn.functional.linear(x, self.weight) * self.gain, self.bias


@pytest.mark.parametrize(("in_splits", "out_splits"), SPLITS)
def test_layers_that_return_their_bias(in_splits, out_splits):
    whole, x = whole_linear(), torch.randn(3, 7)
    options = {"in_splits": in_splits, "out_splits": out_splits, "linear_cls": ReturnsBias, "gain": 2.0}
    tiled = TiledLinearReturnBias(7, 5, init_linear=whole, **options)
    output, bias = tiled(x)
    torch.testing.assert_close(output, 2 * (x @ whole.weight.T))
    assert torch.equal(bias, whole.bias)
    pairs = TiledLinearReturnBias(7, 5, bias=False, combine_out_splits=False, **options)(x)
    assert len(pairs) == out_splits
    assert all(bias is None for _, bias in pairs)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"in_splits": 0}, "in_splits: expected 1 to 7, the features that are split, got 0"),
        ({"in_splits": 8}, "in_splits: expected 1 to 7, the features that are split, got 8"),
        ({"out_splits": -1}, "out_splits: expected 1 to 5, the features that are split, got -1"),
        ({"out_splits": 6}, "out_splits: expected 1 to 5, the features that are split, got 6"),
    ],
)
def test_a_number_of_parts_out_of_range_is_named(arguments, problem):
    with pytest.raises(ConfigError, match=problem):
        TiledLinear(7, 5, **arguments)


@pytest.mark.parametrize("other", [nn.Linear(5, 7), nn.Linear(7, 5, bias=False), nn.ReLU()])
def test_only_a_layer_of_the_same_sizes_can_be_copied(other):
    with pytest.raises(UsageError, match=r"expected a layer with a weight of shape \(5, 7\) and bias=True"):
        TiledLinear(7, 5).copy_params_from(other)


@pytest.mark.parametrize(
    ("split", "given"),
    [
        (False, torch.zeros(2, 6)),
        (False, [torch.zeros(2, 4), torch.zeros(2, 3)]),
        (True, torch.zeros(2, 7)),
        (True, [torch.zeros(2, 3), torch.zeros(2, 4)]),
        (True, [torch.zeros(2, 7)]),
    ],
)
def test_an_input_that_is_split_otherwise_is_refused(split, given):
    with pytest.raises(UsageError, match=r"TiledLinear.forward: expected .* features"):
        TiledLinear(7, 5, in_splits=2, input_is_already_split=split)(given)


# -- at stage 3 ---------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, **splits: int) -> None:
        super().__init__()
        self.up = TiledLinear(32, 64, **splits) if splits else nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def model_of(splits: dict[str, int]) -> nn.Sequential:
    return nn.Sequential(*(Block(**splits) for _ in range(2)))


def copy_into(tiled: nn.Sequential, whole: nn.Sequential) -> None:
    for mine, theirs in zip(tiled, whole, strict=True):
        mine.up.copy_params_from(theirs.up)
        mine.down.load_state_dict(theirs.down.state_dict())


CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "eps": 1e-3}},
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
    },
}


def train(model: nn.Module, steps: int = 3):
    engine, *_ = deepspeed.initialize(model=model, config=CONFIG)
    for step in range(steps):
        x = torch.randn(4, 32, generator=torch.Generator().manual_seed(step))
        loss = engine(x).square().mean()
        engine.backward(loss)
        engine.step()
    return engine


@on_ranks(2)
def test_training_at_stage_3_equals_that_of_whole_layers():
    torch.manual_seed(0)
    whole, tiled = model_of({}), model_of({"in_splits": 2, "out_splits": 2})
    copy_into(tiled, whole)
    expected, got = train(whole), train(tiled)
    for mine, theirs in zip(got.module, expected.module, strict=True):
        rows = [
            torch.cat([safe_get_full_fp32_param(tile.weight) for tile in row], 1) for row in mine.up.linears
        ]
        torch.testing.assert_close(torch.cat(rows), safe_get_full_fp32_param(theirs.up.weight))
    got.destroy()
    expected.destroy()


@on_ranks(2)
def test_a_tile_is_a_unit_of_its_own_inside_a_block():
    engine = train(model_of({"in_splits": 2, "out_splits": 4}))
    held = [unit.names for unit in engine.optimizer.units]
    assert ["0.up.linears.3.0.weight"] in held
    assert ["0.up.linears.3.1.weight", "0.up.linears.3.1.bias"] in held
    assert ["0.down.weight", "0.down.bias"] in held
    engine.destroy()


class OneTiled(nn.Module):
    def __init__(self, **splits: int) -> None:
        super().__init__()
        self.head = TiledLinear(32, 64, bias=False, **splits)

    def forward(self, x):
        return self.head(x)


@on_ranks(2)
def test_never_is_more_than_two_tiles_gathered():
    peaks = {}
    for tiles in (1, 8):
        engine = train(OneTiled(out_splits=tiles))
        meter = engine.optimizer.parameter_offload.meter
        peaks[tiles] = meter.peak_numel
        assert meter.numel == 0
        engine.destroy()
    assert peaks[1] == 32 * 64
    assert peaks[8] <= 2 * 32 * 64 // 8


@on_ranks(2)
def test_born_sharded_it_takes_the_values_of_a_sharded_layer():
    with Init():
        whole = nn.Linear(7, 5)
        tiled = TiledLinear(7, 5, in_splits=2, out_splits=2, init_linear=whole)
        alone = TiledLinear(64, 5, in_splits=4)
    with GatheredParameters([*whole.parameters(), *tiled.parameters(), *alone.parameters()]):
        rows = [torch.cat([tile.weight for tile in row], dim=1) for row in tiled.linears]
        assert torch.equal(torch.cat(rows), whole.weight)
        assert torch.equal(torch.cat([row[-1].bias for row in tiled.linears]), whole.bias)
        assert all(param.abs().max() <= 64**-0.5 for param in alone.parameters())
    x = torch.ones(2, 7)
    engine, *_ = deepspeed.initialize(model=tiled, config={**CONFIG, "optimizer": None})
    with GatheredParameters(list(whole.parameters())):
        torch.testing.assert_close(engine(x), whole(x))
    engine.destroy()
