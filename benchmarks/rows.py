"""What each row of a comparison does with the model: one `Trainer` per framework.

ours:STAGE       this project, ZeRO stage 0, 1 or 2
original:STAGE   the original DeepSpeed with the same configuration
ddp              torch DDP over a bf16 model, fp32 master weights kept by hand, fused AdamW
fsdp2            torch fully_shard per block, bf16 parameters and reduction, fused AdamW on the fp32 shards
compute          forward and backward alone: no communication and no update, the limit for everybody
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from model import GPT
from torch import Tensor, nn

LR, BETAS, EPS, WEIGHT_DECAY, CLIP = 3e-4, (0.9, 0.95), 1e-8, 0.1, 1.0


class Trainer(Protocol):
    """The three phases of a training step that are timed."""

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of a micro-batch."""

    def backward(self, loss: Tensor) -> None:
        """Make gradients, averaged over ranks where the framework does so here."""

    def step(self) -> None:
        """Clip, update, clear the gradients."""


class EngineTrainer:
    """A DeepSpeed engine, this project's or the original's: whichever this interpreter imports."""

    def __init__(self, model: GPT, stage: int, batch: int) -> None:
        import deepspeed

        self.engine, *_ = deepspeed.initialize(
            model=model, model_parameters=list(model.parameters()), config=engine_config(stage, batch)
        )

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Run the engine on a micro-batch."""
        loss: Tensor = self.engine(ids, targets)
        return loss

    def backward(self, loss: Tensor) -> None:
        """Let the engine scale and differentiate."""
        self.engine.backward(loss)

    def step(self) -> None:
        """Let the engine update."""
        self.engine.step()


class DDPTrainer:
    """bf16 model under DDP; the classic hand-written mixed-precision step.

    DDP averages bf16 gradients; step casts them to fp32, clips, runs fused AdamW on the fp32 master weights
    and copies these back into the bf16 model.
    """

    def __init__(self, model: GPT, stage: int, batch: int) -> None:
        model.bfloat16()
        self.ddp = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        self.parameters = list(model.parameters())
        self.masters = [nn.Parameter(p.detach().float()) for p in self.parameters]
        self.optimizer = make_adamw(self.masters)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Run the wrapped model."""
        loss: Tensor = self.ddp(ids, targets)
        return loss

    def backward(self, loss: Tensor) -> None:
        """Differentiate; DDP reduces while it goes."""
        loss.backward()

    @torch.no_grad()
    def step(self) -> None:
        """Update the masters in fp32 and publish them as bf16."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
        nn.utils.clip_grad_norm_(self.masters, CLIP)
        self.optimizer.step()
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            parameter.copy_(master)
        self.ddp.zero_grad()
        self.optimizer.zero_grad()


class FSDP2Trainer:
    """fully_shard of every block and the root: sharded parameters, gradients and optimizer states."""

    def __init__(self, model: GPT, stage: int, batch: int) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
        for block in model.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        self.model = model
        self.optimizer = make_adamw(list(self.model.parameters()))

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Run the sharded model."""
        loss: Tensor = self.model(ids, targets)
        return loss

    def backward(self, loss: Tensor) -> None:
        """Differentiate; FSDP reduces while it goes."""
        loss.backward()

    def step(self) -> None:
        """Clip and update the shards."""
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()


class ComputeTrainer:
    """bf16 forward and backward, gradients thrown away."""

    def __init__(self, model: GPT, stage: int, batch: int) -> None:
        self.model = model.bfloat16()

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Run the model."""
        loss: Tensor = self.model(ids, targets)
        return loss

    def backward(self, loss: Tensor) -> None:
        """Differentiate."""
        loss.backward()

    def step(self) -> None:
        """Drop the gradients."""
        self.model.zero_grad()


TRAINERS: dict[str, Callable[[GPT, int, int], Trainer]] = {
    "ours": EngineTrainer,
    "original": EngineTrainer,
    "ddp": DDPTrainer,
    "fsdp2": FSDP2Trainer,
    "compute": ComputeTrainer,
}

# A row stands beside the row it is compared with, so that the two of a pair meet the same machine load.
DEFAULT_ROWS = (
    "ours:0", "original:0", "ours:1", "original:1", "ours:2", "original:2", "ddp", "fsdp2", "compute",
)  # fmt: skip

LABELS = {
    "ours": "this project, stage {}",
    "original": "original 0.19.8, stage {}",
    "ddp": "torch DDP",
    "fsdp2": "torch FSDP2",
    "compute": "compute only",
}


def split_row(row: str) -> tuple[str, int]:
    """Split `kind[:stage]` and check it."""
    kind, _, stage = row.partition(":")
    staged = kind in ("ours", "original")
    if kind not in TRAINERS or (staged and stage not in ("0", "1", "2", "3")) or (not staged and stage):
        raise ValueError(f"row: expected one of {', '.join(DEFAULT_ROWS)}, got {row!r}")
    return kind, int(stage or 0)


def label(row: str) -> str:
    """Name a row for the reader."""
    kind, stage = split_row(row)
    return LABELS[kind].format(stage)


def make_trainer(row: str, model: GPT, batch: int) -> Trainer:
    """Build the trainer of a row around `model`."""
    kind, stage = split_row(row)
    return TRAINERS[kind](model, stage, batch)


def make_adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Build torch's fastest AdamW."""
    return torch.optim.AdamW(
        parameters, lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, fused=True
    )  # fmt: skip


def engine_config(stage: int, batch: int) -> dict[str, Any]:
    """Write the configuration both engines get; what it does not name stays at their defaults."""
    return {
        "train_micro_batch_size_per_gpu": batch,
        "gradient_clipping": CLIP,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": LR, "betas": list(BETAS), "eps": EPS, "weight_decay": WEIGHT_DECAY},
        },
    }
