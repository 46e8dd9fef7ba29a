"""A small model with dropout whose layers may be checkpointed, and what tests ask about it."""

from __future__ import annotations

import logging
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from deepspeed.activation_checkpointing import checkpointing
from deepspeed.common.logging import logger

WIDTH = 6
LAYERS = 3


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 8), nn.GELU(), nn.Linear(8, WIDTH))
        self.drop = nn.Dropout(0.3)

    def forward(self, hidden: Tensor, scale: Tensor, name: str, shift: Tensor | None = None) -> Tensor:
        assert name == "layer"
        assert shift is None
        return hidden + self.drop(self.body(hidden)) * scale


class Stack(nn.Module):
    """Layers run by `run(layer, hidden, scale, ...)`; without one they are just called."""

    def __init__(self, run=None) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first = nn.Linear(WIDTH, WIDTH)
            self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.run = run
        self.storages: list[StorageWeakRef] = []

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs)
        scale = torch.full((WIDTH,), 1.5)
        self.storages = []
        for layer in self.layers:
            args = (hidden, scale, "layer", None)
            self.storages.append(StorageWeakRef(hidden.untyped_storage()))
            hidden = layer(*args) if self.run is None else self.run(layer, *args)
        return hidden.square().mean()


def batch(step: int, rank: int = 0) -> Tensor:
    """Return [5, 6] inputs, different for every argument."""
    return torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(100 * step + rank))


def gradients_of(model: nn.Module, *, seed: int = 3, keep: bool = False) -> list[Tensor]:
    """Run forward and backward with dropout from `seed`; return the loss, the gradients and a random number."""
    torch.manual_seed(seed)
    model.zero_grad()
    loss = model(batch(1))
    loss.backward(retain_graph=keep)
    if keep:
        model.zero_grad()
        loss.backward()
    return [loss.detach(), *(param.grad.clone() for param in model.parameters()), torch.rand(1)]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    """Every bit is the same."""
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


@contextmanager
def unconfigured():
    """Give checkpointing fresh settings and streams inside, and those it had after it."""
    settings, tracker = checkpointing._settings, checkpointing._CUDA_RNG_STATE_TRACKER
    kept, states, seeds = dict(vars(settings)), tracker.get_states(), set(tracker.seeds_)
    settings.__init__()
    tracker.reset()
    try:
        yield
    finally:
        vars(settings).update(kept)
        tracker.states_, tracker.seeds_ = states, seeds


@contextmanager
def log_lines():
    """Collect what the package logs."""
    lines: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record):
            lines.append(record.getMessage())

    listener = Listener()
    logger.addHandler(listener)
    try:
        yield lines
    finally:
        logger.removeHandler(listener)
