"""Stage 3 follows any graph: order, number and place of uses may change at every step and on every rank."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from collectives import gathers_are_collectives
from harness import run_on_ranks
from torch import Tensor, nn
from twins import Twins, data, seeded

WIDTH = 6


class Blocks(nn.Module):
    """Blocks that forward calls as it is told."""

    def __init__(self, count: int = 4) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 7), nn.Tanh(), nn.Linear(7, WIDTH))
            for _ in range(count)
        )

    def forward(self, hidden: Tensor, order, raise_after: int | None = None) -> Tensor:
        hidden = self.first(hidden)
        for place, index in enumerate(order):
            if place == raise_after:
                raise RuntimeError("in the middle")
            hidden = hidden + self.blocks[index](hidden)
        return hidden


def loss_along(order, step=0):
    return lambda model, rank: model(data(rank, step), order).square().mean()


LIMITS = [
    {},
    {"stage3_max_reuse_distance": 10**9},
    {"stage3_max_live_parameters": 1},
    {"overlap_comm": False, "stage3_param_persistence_threshold": 8},
]


def another_order_every_step(zero):
    twins = Twins(seeded(1, Blocks), **zero)
    for step, order in enumerate(
        [(0, 1, 2, 3), (3, 1, 0, 2), (2, 2, 0, 1, 2, 3), (1,), (), (0, 3), (3, 2, 1, 0)]
    ):
        twins.step(loss_along(order, step))
    twins.finish()


@pytest.mark.parametrize("zero", LIMITS, ids=str)
@pytest.mark.parametrize("ranks", [2, 3])
def test_units_in_another_order_twice_or_not_at_all(ranks, zero):
    run_on_ranks(ranks, another_order_every_step, zero)


def another_order_on_every_rank(zero):
    twins = Twins(seeded(2, Blocks), **zero)
    orders = [[(0, 1), (1, 0)], [(), (0, 1, 2, 3)], [(3, 3), (1,)], [(2, 0), ()]]
    for step, by_rank in enumerate(orders):
        twins.step(lambda model, rank, of=by_rank, at=step: model(data(rank, at), of[rank]).square().mean())
    twins.finish()


@pytest.mark.parametrize("zero", LIMITS, ids=str)
def test_a_unit_used_on_one_rank_only(zero):
    run_on_ranks(2, another_order_on_every_rank, zero)


def interleaved():
    twins = Twins(seeded(3, Blocks))
    for step in range(3):
        loss = twins.engine(data(0, step), (0, 1, 2)).square().mean()
        with torch.no_grad():
            for order in [(3,), (0, 0), ()]:
                torch.testing.assert_close(
                    twins.engine(data(5), order), twins.plain(data(5), order), rtol=1e-5, atol=1e-6
                )
        twins.engine.eval()
        twins.engine(data(6), (2, 1))  # with gradients, never used
        twins.engine.train()
        with torch.inference_mode():
            twins.engine(data(7), (1, 2))
        twins.engine.backward(loss)
        twins.engine.step()
        twins.plain(data(0, step), (0, 1, 2)).square().mean().backward()
        twins.plain_step()
    twins.finish()


def test_evaluation_between_forward_and_backward():
    run_on_ranks(2, interleaved)


def exception_then_on(zero):
    twins = Twins(seeded(4, Blocks), **zero)
    for step in range(3):
        for raise_after in (0, 1, 2):
            with pytest.raises(RuntimeError, match="in the middle"):
                twins.engine(data(0), (0, 1, 2), raise_after)
            with torch.no_grad(), pytest.raises(RuntimeError, match="in the middle"):
                twins.engine(data(0), (2, 1, 0), raise_after)
        twins.step(loss_along((0, 1, 2, 3), step))
    twins.finish()


@pytest.mark.parametrize("zero", LIMITS, ids=str)
def test_an_exception_in_the_middle_of_a_forward(zero):
    run_on_ranks(2, exception_then_on, zero)


def exception_in_backward():
    twins = Twins(seeded(4, Blocks))

    def fail(_grad):
        raise RuntimeError("in backward")

    for step in range(3):
        hidden = twins.engine(data(0), (0, 1, 2))
        hidden.register_hook(fail)
        with pytest.raises(RuntimeError, match="in backward"):
            twins.engine.backward(hidden.sum())
        twins.step(loss_along((0, 1, 2, 3), step))
    twins.finish()


def test_an_exception_in_the_middle_of_a_backward():
    run_on_ranks(2, exception_in_backward)


def forwards_then_backward(zero):
    twins = Twins(seeded(5, Blocks), **zero)
    for step in range(3):
        twins.step(
            lambda model, rank, at=step: (
                model(data(rank, at), (0, 1)).square().mean()
                + model(data(rank, at + 50), (1, 2)).mean()
                + model(data(rank, at + 70), (3, 0)).abs().mean()
            )
        )
    twins.finish()


@pytest.mark.parametrize("zero", LIMITS, ids=str)
def test_several_forwards_before_one_backward(zero):
    run_on_ranks(2, forwards_then_backward, zero)


def several_backwards(zero):
    twins = Twins(seeded(6, Blocks), **zero)
    for step in range(3):
        for order in [(0, 1), (2,), (3, 1)]:
            twins.backward_everywhere(loss_along(order, step))
        loss = twins.engine(data(0, step), (1, 2)).square().mean()
        twins.engine.backward(loss, retain_graph=True)
        twins.engine.backward(loss)
        (2 * twins.plain(data(0, step), (1, 2)).square().mean()).backward()
        twins.engine.step()
        twins.plain_step()
        assert twins.engine.memory_report().gathered == 0
    twins.finish()


@pytest.mark.parametrize("zero", LIMITS, ids=str)
def test_several_backwards_before_a_step(zero):
    run_on_ranks(2, several_backwards, zero)


def no_sync(stage):
    twins = Twins(seeded(7, Blocks), stage=stage)
    for step in range(2):
        with twins.engine.no_sync():
            for order in [(0, 1), (2,), (3, 1)]:
                twins.backward_everywhere(loss_along(order, step))
        twins.step(loss_along((0, 1, 2, 3), step))
    twins.finish()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_no_sync(stage):
    run_on_ranks(2, no_sync, stage)


# -- experts --------------------------------------------------------------------------------------


class Routed(nn.Module):
    """Four experts; which of them work depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 4)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, WIDTH)) for _ in range(4)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        weights = self.gate(hidden).softmax(-1)
        chosen = weights.argmax(-1)
        out = torch.zeros_like(hidden)
        for index in chosen.unique().tolist():
            rows = (chosen == index).nonzero().flatten()
            out = out.index_add(0, rows, self.experts[index](hidden[rows]) * weights[rows, index : index + 1])
        return hidden + out


class Packed(nn.Module):
    """Four experts in three-dimensional parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, WIDTH, 8) * 0.3)
        self.down = nn.Parameter(torch.randn(4, 8, WIDTH) * 0.3)

    def forward(self, hidden: Tensor) -> Tensor:
        out = hidden
        for index in {int(one) % 4 for one in hidden[:, 0].mul(3).round().tolist()}:
            out = out + torch.tanh(hidden @ self.up[index]) @ self.down[index]
        return out


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Routed(), Packed(), Routed(), Packed()])

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


def experts(stage, zero, by_collectives):
    with gathers_are_collectives() if by_collectives else nullcontext():
        twins = Twins(seeded(8, Experts), stage=stage, lr=0.02, **zero)
        for step in range(4):
            twins.step(lambda model, rank, at=step: model(data(rank, at, (1 + rank, WIDTH))).square().mean())
            with torch.no_grad():
                twins.engine(data(torch.distributed.get_rank(), 99 + step))
        twins.finish()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_experts_that_ranks_choose_differently(stage):
    run_on_ranks(2, experts, stage, {}, False)


@pytest.mark.parametrize("zero", LIMITS[:2], ids=str)
def test_experts_that_ranks_choose_differently_where_gathers_are_collectives(zero):
    run_on_ranks(2, experts, 3, zero, True)


# -- weights used from elsewhere ------------------------------------------------------------------


class Shared(nn.Module):
    """One layer in several parents, a weight used by somebody else, and ties."""

    def __init__(self, tie: str) -> None:
        super().__init__()
        self.tie = tie
        self.embed = nn.Embedding(WIDTH, WIDTH)
        common = nn.Linear(WIDTH, WIDTH)
        self.left = nn.Sequential(nn.Linear(WIDTH, WIDTH), common, nn.Tanh())
        self.right = nn.Sequential(common, nn.LayerNorm(WIDTH))
        self.other = nn.ModuleDict({"deep": nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))})
        self.head = nn.Linear(WIDTH, WIDTH, bias=False)
        if tie == "parameter":
            self.head.weight = self.embed.weight
        elif tie == "module":
            self.head = self.embed
        elif tie == "functional":
            del self.head
        elif tie == "lambda":
            self.read = [self.embed]
            del self.head

    def forward(self, hidden: Tensor) -> Tensor:
        tokens = hidden[:, 0].abs().mul(2).long().clamp(max=WIDTH - 1)
        hidden = self.embed(tokens) + hidden
        hidden = self.left(hidden) + self.right(hidden)
        hidden = F.linear(hidden, self.other["deep"][1].weight.t(), self.other["deep"][0].bias)
        hidden = hidden @ self.other["deep"][0].weight.detach()
        if self.tie == "parameter":
            return self.head(hidden)
        if self.tie == "module":
            return hidden @ self.head.weight.T
        if self.tie == "functional":
            return F.linear(hidden, self.embed.weight)
        return torch.einsum("bi,oi->bo", hidden, self.read[0].weight)


def shared(tie, zero):
    twins = Twins(seeded(9, lambda: Shared(tie)), **zero)
    for step in range(4):
        twins.step(lambda model, rank, at=step: model(data(rank, at)).square().mean())
    twins.finish()


@pytest.mark.parametrize("zero", LIMITS[:3], ids=str)
@pytest.mark.parametrize("tie", ["parameter", "module", "functional", "lambda"])
def test_shared_layers_weights_used_elsewhere_and_ties(tie, zero):
    run_on_ranks(2, shared, tie, zero)


class Parametrised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, 8))
        self.spectral = nn.utils.parametrizations.orthogonal(nn.Linear(8, 8))
        self.cell = nn.LSTM(8, WIDTH, batch_first=True)
        self.attention = nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.0, batch_first=True)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.spectral(self.normed(hidden))[None]
        return self.attention(self.cell(hidden)[0])


def parametrised(stage):
    twins = Twins(seeded(10, Parametrised), stage=stage)
    for step in range(3):
        twins.step(lambda model, rank, at=step: model(data(rank, at)).square().mean())
        with torch.no_grad():
            twins.engine.eval()
            twins.plain.eval()  # the fast path of the transformer layer
            torch.testing.assert_close(twins.engine(data(3)), twins.plain(data(3)), rtol=1e-5, atol=1e-6)
            twins.engine.train()
            twins.plain.train()
    twins.finish(1e-5)


@pytest.mark.parametrize("stage", [2, 3])
def test_parametrisations_lstm_and_attention(stage):
    run_on_ranks(2, parametrised, stage)


# -- gradients of gradients -----------------------------------------------------------------------


def penalised(model, rank, step):
    inputs = data(rank, step).requires_grad_()
    out = model(inputs, (0, 1, 2))
    (slope,) = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
    return out.mean() + slope.square().mean()


def gradient_penalty(zero):
    twins = Twins(seeded(11, Blocks), lr=0.01, **zero)
    for step in range(3):
        twins.step(lambda model, rank, at=step: penalised(model, rank, at))
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    twins.finish(1e-5)


@pytest.mark.parametrize("zero", LIMITS, ids=str)
def test_gradient_penalty(zero):
    run_on_ranks(2, gradient_penalty, zero)


class Scaled(torch.autograd.Function):
    """Keeps the weight as an attribute, as many hand-written functions do."""

    @staticmethod
    def forward(ctx, hidden, weight):
        ctx.weight = weight
        ctx.save_for_backward(hidden)
        return hidden @ weight.t()

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.weight, grad.t() @ ctx.saved_tensors[0]


class Handwritten(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = torch.tanh(Scaled.apply(hidden, layer.weight) + layer.bias)
        return hidden


def handwritten():
    twins = Twins(seeded(12, Handwritten))
    for step in range(3):
        twins.step(lambda model, rank, at=step: model(data(rank, at)).square().mean())
    twins.finish()


def test_a_function_that_keeps_its_weight_as_an_attribute():
    run_on_ranks(2, handwritten)


# -- what modules return --------------------------------------------------------------------------


@dataclass
class Result:
    hidden: Tensor
    more: dict


class Positions(nn.Module):
    """Returns a view of its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(9, WIDTH))

    def forward(self, length: int) -> Tensor:
        return self.table[:length]


class Unusual(nn.Module):
    """Returns a dataclass, keeps an output on itself, and passes views of weights around."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = Positions()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.kept: Tensor | None = None

    def forward(self, hidden: Tensor) -> Result:
        where = self.positions(hidden.shape[0])
        for layer in self.layers:
            hidden = torch.tanh(layer(hidden))
        self.kept = self.layers[0](hidden)
        return Result(hidden + where, {"again": [hidden * 2]})


def unusual(zero):
    twins = Twins(seeded(13, Unusual), **zero)

    def loss_of(model, rank, step):
        result = model(data(rank, step))
        kept = getattr(model, "module", model).kept
        return result.hidden.square().mean() + result.more["again"][0].mean() + kept.square().mean()

    for step in range(3):
        twins.step(lambda model, rank, at=step: loss_of(model, rank, at))
    twins.engine.module.kept = None
    twins.finish()


@pytest.mark.parametrize("zero", [*LIMITS, {"stage3_module_granularity_threshold": 0}], ids=str)
def test_outputs_in_a_dataclass_or_kept_on_the_module(zero):
    run_on_ranks(2, unusual, zero)
