"""An engine and plain PyTorch beside it: the same model, the same losses, compared after each step."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import deepspeed
from deepspeed.errors import UsageError
from deepspeed.zero import GatheredParameters

LossOf = Callable[[nn.Module, int], Tensor]
"""(model, rank) -> the loss of that rank's data."""

EVERYTHING_RELEASED = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_reuse_distance": 0,
}


class Twins:
    """`engine` trains `model` on all ranks; `plain` trains a copy on the data of all of them.

    Args:
        model: the same on every rank.
        stage: of ZeRO.
        gas: micro-batches per step.
        zero: further keys of ``zero_optimization``; by default everything is released between uses.
    """

    def __init__(self, model: nn.Module, *, stage: int = 3, gas: int = 1, lr: float = 0.1, **zero) -> None:
        with GatheredParameters(model.parameters()):  # of one that was born sharded
            self.plain = copy.deepcopy(model)
        self.gas = gas
        self.sgd = torch.optim.SGD(self.plain.parameters(), lr=lr, momentum=0.9)
        trained = [param for param in model.parameters() if param.requires_grad]
        self.engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.SGD(trained, lr=lr, momentum=0.9),
            config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": gas,
                "gradient_clipping": 0.0,
                "zero_optimization": {"stage": stage, **EVERYTHING_RELEASED, **zero},
            },
        )

    def step(self, *losses_of: LossOf) -> None:
        """Take one step, a loss for each micro-batch (the last repeats), and compare the losses."""
        ranks, rank = dist.get_world_size(), dist.get_rank()
        for micro in range(self.gas):
            loss_of = losses_of[min(micro, len(losses_of) - 1)]
            loss = loss_of(self.engine, rank)
            expected = [loss_of(self.plain, one) for one in range(ranks)]
            torch.testing.assert_close(loss.detach(), expected[rank].detach(), rtol=1e-5, atol=1e-6)
            self.engine.backward(loss)
            for one in expected:
                (one / ranks / self.gas).backward()
            self.engine.step()
        self.plain_step()
        assert self.engine.memory_report().gathered == 0

    def plain_step(self) -> None:
        """Update the plain twin."""
        self.sgd.step()
        self.sgd.zero_grad()

    def backward_everywhere(self, loss_of: LossOf, **options) -> None:
        """Backward of one loss on both, without a step."""
        ranks = dist.get_world_size()
        self.engine.backward(loss_of(self.engine, dist.get_rank()), **options)
        for one in range(ranks):
            (loss_of(self.plain, one) / ranks / self.gas).backward()

    def finish(self, tolerance: float = 2e-6) -> None:
        """Compare all weights, and take the engine down."""
        state = self.engine.module_state_dict()
        for name, value in self.plain.state_dict().items():
            if isinstance(value, Tensor):
                torch.testing.assert_close(
                    state[name],
                    value.detach(),
                    rtol=tolerance,
                    atol=tolerance,
                    msg=lambda m, n=name: f"{n}: {m}",
                )
        self.engine.destroy()


def data(rank: int, step: int = 0, shape: tuple[int, ...] = (3, 6)) -> Tensor:
    """Return normal numbers that are different for every argument."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1 + 1000 * step + rank))


def seeded(seed: int, make: Callable[[], nn.Module]) -> nn.Module:
    """Return a module whose weights depend on the seed only."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def refused(action: Callable[[], object], *words: str) -> None:
    """Make sure that `action` raises a UsageError that contains the words."""
    with pytest.raises(UsageError) as caught:
        action()
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"
