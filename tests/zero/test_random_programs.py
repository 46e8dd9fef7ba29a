"""A hundred small random programs, with other limits, and another graph at every step and on every rank."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from harness import run_on_ranks
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from twins import Twins, data, seeded

WIDTH = 4


class Machine(nn.Module):
    """Runs a list of instructions on a hidden state."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.parts = nn.ModuleList(self._part(rng, depth=0) for _ in range(rng.randint(2, 4)))
        self.table = nn.Embedding(5, WIDTH)
        self.gain = nn.Parameter(torch.ones(WIDTH))
        self.tail = nn.Linear(WIDTH, WIDTH, bias=False)
        if rng.random() < 0.3:
            self.tail.weight = self.parts[0].get_parameter(self._square(self.parts[0]))
        if rng.random() < 0.3:
            self.parts[1].requires_grad_(False)
        if rng.random() < 0.3:
            self.again = self.parts[-1]

    @staticmethod
    def _part(rng: random.Random, depth: int) -> nn.Module:
        if depth < 2 and rng.random() < 0.4:
            return nn.Sequential(*(Machine._part(rng, depth + 1) for _ in range(rng.randint(1, 2))))
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), rng.choice([nn.Tanh, nn.GELU])())

    @staticmethod
    def _square(part: nn.Module) -> str:
        return next(name for name, param in part.named_parameters() if param.dim() == 2)

    def forward(self, hidden: Tensor, program) -> Tensor:
        hidden = hidden * self.gain
        for action, index in program:
            hidden = getattr(self, action)(hidden, self.parts[index % len(self.parts)])
            hidden = hidden / (1 + hidden.detach().abs().amax())
        return self.tail(hidden)

    def call(self, hidden: Tensor, part: nn.Module) -> Tensor:
        return hidden + part(hidden)

    def reentrant(self, hidden: Tensor, part: nn.Module) -> Tensor:
        return hidden + (
            checkpoint(part, hidden, use_reentrant=True) if torch.is_grad_enabled() else part(hidden)
        )

    def recompute(self, hidden: Tensor, part: nn.Module) -> Tensor:
        return hidden + checkpoint(part, hidden, use_reentrant=False)

    def nested(self, hidden: Tensor, part: nn.Module) -> Tensor:
        def both(value: Tensor) -> Tensor:
            return checkpoint(part, value * self.gain, use_reentrant=False) + self.tail(value)

        return checkpoint(both, hidden, use_reentrant=False)

    def functional(self, hidden: Tensor, part: nn.Module) -> Tensor:
        return hidden + F.linear(hidden, part.get_parameter(self._square(part)))

    def weight_only(self, hidden: Tensor, part: nn.Module) -> Tensor:
        return hidden * self.gain + sum(param.sum() for param in part.parameters())

    def look_up(self, hidden: Tensor, part: nn.Module) -> Tensor:
        return hidden + self.table(torch.arange(len(hidden)) + 1)

    def aside(self, hidden: Tensor, part: nn.Module) -> Tensor:
        with torch.no_grad():
            shift = part(hidden).mean()
        return hidden + shift

    def stumble(self, hidden: Tensor, part: nn.Module) -> Tensor:
        try:
            part(hidden[:, :2])
        except RuntimeError:
            return hidden
        raise AssertionError("expected a shape error")

    def slope(self, hidden: Tensor, part: nn.Module) -> Tensor:
        params = [param for param in part.parameters() if param.requires_grad]
        if not params:
            return hidden
        with torch.enable_grad():
            inside = torch.autograd.grad(part(hidden.detach()).sum(), params)
        return hidden + sum(one.mean() for one in inside)


ACTIONS = [name for name in vars(Machine) if not name.startswith("_") and name != "forward"]


def random_zero(rng: random.Random) -> dict:
    return {
        "stage3_param_persistence_threshold": rng.choice([0, 0, 5]),
        "stage3_max_reuse_distance": rng.choice([0, 30, 10**9]),
        "stage3_max_live_parameters": rng.choice([1, 40, 10**9]),
        "stage3_prefetch_bucket_size": rng.choice([0, 40, 10**9]),
        "stage3_module_granularity_threshold": rng.choice([0, 0, 40]),
        "reduce_bucket_size": rng.choice([1, 50, 10**6]),
        "overlap_comm": rng.choice([True, False]),
    }


def program_of(rng: random.Random) -> list[tuple[str, int]]:
    return [(rng.choice(ACTIONS), rng.randint(0, 9)) for _ in range(rng.randint(0, 6))]


def run_program(seed: int, ranks: int) -> None:
    rng = random.Random(seed)
    twins = Twins(seeded(seed, lambda: Machine(rng)), gas=rng.choice([1, 1, 2]), lr=0.02, **random_zero(rng))
    for step in range(3):
        programs = [program_of(rng) for _ in range(ranks)]
        if rng.random() < 0.5:
            programs = [program_of(rng)] * ranks
        second = program_of(rng) if rng.random() < 0.4 else None

        def loss_of(model, rank, at=step, programs=programs, second=second):
            loss = model(data(rank, at, (2, WIDTH)), programs[rank]).square().mean()
            if second is not None:
                loss = loss + model(data(rank, at + 50, (2, WIDTH)), second).mean()
            return loss

        if rng.random() < 0.3:
            with torch.no_grad():
                twins.engine(data(0, 77, (2, WIDTH)), program_of(rng))
        if rng.random() < 0.3:
            twins.backward_everywhere(loss_of)
        twins.step(loss_of)
    twins.finish(1e-5)


def run_programs(first: int, count: int, ranks: int) -> None:
    for seed in range(first, first + count):
        try:
            run_program(seed, ranks)
        except BaseException as error:
            raise AssertionError(f"program {seed} on {ranks} ranks") from error


@pytest.mark.parametrize("first", range(0, 80, 20))
def test_random_programs_equal_plain_torch(first):
    run_on_ranks(2, run_programs, first, 20, 2)


def test_random_programs_on_three_ranks_equal_plain_torch():
    run_on_ranks(3, run_programs, 80, 20, 3)
