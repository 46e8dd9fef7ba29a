"""Plain PyTorch on the whole batch: what every configuration is compared with.

`PlainTrainer` keeps fp32 weights, computes each micro-batch of each rank in the storage dtype, averages the
gradients in fp32, clips by global norm and steps a torch optimizer: no sharding, no collectives.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]
LossOf = Callable[[nn.Module, Batch], Tensor]


class PlainTrainer:
    """Train a copy of `model` on one process.

    Args:
        model: with fp32 weights.
        make_optimizer: makes a torch optimizer from the weights.
        storage: dtype the model computes in.
        clip: largest gradient norm, 0 for none.
    """

    def __init__(self, model: nn.Module, make_optimizer, *, storage=torch.float32, clip: float = 0.0) -> None:
        self.master = copy.deepcopy(model)
        self.working = copy.deepcopy(model).to(storage)
        trainable = [param for param in self.master.parameters() if param.requires_grad]
        self.optimizer = make_optimizer(trainable)
        self.clip = clip
        self.grad_norm = torch.tensor(0.0)

    def step(self, batches: Iterable[Batch], loss_of: LossOf, *, gas: int = 1) -> float:
        """Take one step on the mean over `batches` (of every rank and micro-batch); return the mean loss.

        As everybody does, the loss is divided by the `gas` micro-batches of a rank before backward.
        """
        batches = list(batches)
        losses = []
        for batch in batches:
            self.working.zero_grad()
            loss = loss_of(self.working, batch)
            (loss / gas).backward()
            losses.append(loss.detach().float())
            self._accumulate(len(batches) // gas)
        grads = [param.grad for param in self.master.parameters() if param.grad is not None]
        self.grad_norm = torch.linalg.vector_norm(
            torch.stack([torch.linalg.vector_norm(grad) for grad in grads])
        )
        if self.clip:
            torch.nn.utils.clip_grad_norm_(self.master.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for weight, source in zip(self.working.parameters(), self.master.parameters(), strict=True):
                weight.copy_(source)
        return float(torch.stack(losses).mean())

    def _accumulate(self, parts: int) -> None:
        for param, source in zip(self.master.parameters(), self.working.parameters(), strict=True):
            if source.grad is not None:
                share = source.grad.float() / parts
                param.grad = share if param.grad is None else param.grad + share
