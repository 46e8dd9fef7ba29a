"""What a user's autograd function gets back of a sharded parameter in its backward."""

from __future__ import annotations

import pytest
import torch
from harness import run_on_ranks
from torch import nn
from torch.utils.checkpoint import checkpoint
from twins import Twins, data, seeded

from deepspeed.zero import GatheredParameters, ZeroParamStatus

SEEN: list[ZeroParamStatus] = []


class Linear(torch.autograd.Function):
    """A product that, like fused losses do, gathers in backward what is not there."""

    @staticmethod
    def forward(ctx, inputs, weight):
        ctx.save_for_backward(inputs, weight, weight.t())
        return inputs @ weight.t()

    @staticmethod
    def backward(ctx, grad):
        inputs, weight, turned = ctx.saved_tensors
        assert not hasattr(turned, "ds_status")  # only a parameter itself has one
        if hasattr(weight, "ds_status"):  # the engine's, not plain PyTorch's
            SEEN.append(weight.ds_status)
            assert weight.ds_shape == weight.shape == (6, 6)
            with GatheredParameters([weight]):
                assert torch.equal(weight, turned.t())
        grad_inputs = torch.empty_like(inputs)
        torch.mm(grad, weight, out=grad_inputs)
        assert type(weight[1:] * 2) is torch.Tensor
        return grad_inputs, grad.t() @ inputs


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.weight = nn.Parameter(torch.randn(6, 6))
        self.again = False

    def forward(self, inputs):
        hidden = self.first(inputs)
        return checkpoint(self.last, hidden, use_reentrant=True) if self.again else self.last(hidden)

    def last(self, hidden):
        return Linear.apply(hidden, self.weight)


def loss_of(model, rank):
    return model(data(rank)).square().mean()


def asks_in_backward(zero):
    twins = Twins(seeded(0, Net), **zero)
    for again in (False, True):
        twins.engine.module.again = twins.plain.again = again
        SEEN.clear()
        twins.step(loss_of)
        assert SEEN == [ZeroParamStatus.AVAILABLE]
    twins.finish()


@pytest.mark.parametrize("zero", [{}, {"stage3_param_persistence_threshold": 1000}])
def test_a_parameter_saved_for_backward_is_one_that_is_available(zero):
    run_on_ranks(2, asks_in_backward, zero)
