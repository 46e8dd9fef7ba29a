"""Views of weights that Python keeps: memory that somebody can still read is not freed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from harness import on_ranks
from torch import Tensor, nn
from twins import Twins, data, refused, seeded

from deepspeed import zero

SIZE = 16
SHAPE = (3, SIZE)


class Keeper(nn.Module):
    """A layer that keeps a view of its weight, and uses it again when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(SIZE, SIZE)
        self.kept: Tensor | None = None
        self.order = "fresh"

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x).tanh() if self.order != "stale" else x
        if self.order != "fresh":
            y = y + (y @ self.kept)
        self.kept = self.linear.weight.detach().t()
        return y


def train(twins: Twins, index: int) -> None:
    twins.backward_everywhere(lambda model, rank: model(data(rank, index, SHAPE)).square().mean())
    twins.engine.step()
    twins.plain_step()


@on_ranks(2)
def test_a_view_kept_on_the_module_follows_the_weight():
    """From the moment on that a forward needs the weight itself, as it does here before the view is used."""
    twins = Twins(seeded(0, lambda: nn.Sequential(nn.Linear(SIZE, SIZE), Keeper(), nn.Linear(SIZE, 1))))
    for index in range(3):
        train(twins, index)
        twins.engine.module[1].order = twins.plain[1].order = "followed"
    twins.finish()


@on_ranks(2)
def test_a_view_that_is_out_of_date_is_not_trained_through():
    twins = Twins(seeded(0, lambda: nn.Sequential(nn.Linear(SIZE, SIZE), Keeper(), nn.Linear(SIZE, 1))))
    train(twins, 0)
    twins.engine.module[1].order = "stale"
    refused(lambda: twins.engine(data(0, 1, SHAPE)), "1.linear.weight", "earlier forward")
    twins.engine.destroy()


@on_ranks(2)
def test_memory_goes_with_the_last_view():
    twins = Twins(seeded(0, lambda: nn.Sequential(Keeper(), nn.Linear(SIZE, 1))))
    train(twins, 0)
    unit = twins.engine.module[0].linear.weight.ds_slot.unit
    assert unit.flat.untyped_storage().nbytes() > 0
    twins.engine.module[0].kept = twins.plain[0].kept = None
    unit.release()
    assert unit.flat.untyped_storage().nbytes() == 0


@dataclass
class Answer:
    loss: Tensor
    weight: Tensor


class Teller(nn.Module):
    """A model whose answer shows its weight, out of sight of the hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor) -> Answer:
        return Answer(self.linear(x).square().mean(), self.linear.weight.detach().view(-1))


@on_ranks(2)
def test_a_view_in_a_dataclass_can_be_read_after_the_forward():
    model = seeded(0, Teller)
    weight = model.linear.weight.detach().clone().view(-1)
    twins = Twins(model)
    answer = twins.engine(data(0, 0, SHAPE))
    twins.engine.backward(answer.loss)
    assert torch.equal(answer.weight, weight)
    twins.engine.step()
    assert torch.equal(answer.weight, weight)  # the values of that moment


@on_ranks(2)
def test_what_a_gathered_context_gave_can_be_read_after_it():
    model = seeded(0, lambda: nn.Sequential(nn.Linear(SIZE, SIZE), nn.Linear(SIZE, 1)))
    expected = [param.detach().clone() for param in model.parameters()]
    twins = Twins(model)
    params = list(twins.engine.module.parameters())
    with zero.GatheredParameters(params):
        kept = [param.data for param in params]
    for value, want in zip(kept, expected, strict=True):
        assert torch.equal(value, want)


@on_ranks(2)
def test_one_view_at_a_time_can_be_read_after_its_context():
    """On a host ``.cpu()`` copies nothing: scripts that collect weights so keep one view each time."""
    model = seeded(0, lambda: nn.Sequential(nn.Linear(SIZE, SIZE), nn.Linear(SIZE, 1)))
    expected = [param.detach().clone() for param in model.parameters()]
    twins = Twins(model)
    for param, want in zip(twins.engine.module.parameters(), expected, strict=True):
        with zero.GatheredParameters([param]):
            value = param.data.cpu()
        assert value.untyped_storage().nbytes() > 0
        assert torch.equal(value, want)


@on_ranks(2)
def test_a_state_dict_of_released_weights_keeps_no_memory():
    """transformers holds one while it loads a model weight by weight."""
    twins = Twins(seeded(0, lambda: nn.Sequential(nn.Linear(SIZE, SIZE), nn.Linear(SIZE, 1))))
    model = twins.engine.module
    state = model.state_dict()
    for param in model.parameters():
        with zero.GatheredParameters([param], modifier_rank=0):
            param.data.add_(1)
    assert state["0.weight"].shape == (SIZE, SIZE)
    assert model[0].weight.ds_slot.unit.flat.untyped_storage().nbytes() == 0


@on_ranks(2)
def test_training_goes_on_from_values_that_were_given_to_numpy():
    twins = Twins(seeded(0, lambda: nn.Sequential(nn.Linear(SIZE, SIZE), nn.Tanh(), nn.Linear(SIZE, SIZE))))
    for index in range(3):
        train(twins, index)
        with zero.GatheredParameters(twins.engine.module.parameters()):
            given = [param.detach().numpy().copy() for param in twins.engine.module.parameters()]
        for ours, plain in zip(given, twins.plain.parameters(), strict=True):
            torch.testing.assert_close(torch.tensor(ours), plain.detach(), rtol=1e-5, atol=1e-6)
    twins.finish()
