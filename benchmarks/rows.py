"""What each row of a comparison does with the model: one `Trainer` per framework.

ours:STAGE       this project, ZeRO stage 0, 1, 2 or 3
original:STAGE   the original DeepSpeed with the same configuration
...:STAGE:TIER   either with states in a tier of tiers.py: host, disk or all_disk
ddp              torch DDP over a bf16 model, fp32 master weights kept by hand, fused AdamW
fsdp2            torch fully_shard per block, bf16 parameters and reduction, fused AdamW on the fp32 shards
fsdp2_whole      the same, but gradients stay whole between micro-batches and are reduced at the last one
fsdp2_live       fsdp2 whose parameters stay gathered from forward to backward
alone            ddp without DDP: every rank trains a replica of its own, no communication, the limit for everybody
compute          forward and backward alone: no update either

In fp32 nothing is cast and nobody keeps master weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from model import GPT
from tiers import STAGES, TIERS, offload_sections
from torch import Tensor, nn

LR, BETAS, EPS, WEIGHT_DECAY, CLIP = 3e-4, (0.9, 0.95), 1e-8, 0.1, 1.0


@dataclass(frozen=True)
class Row:
    """A row's name in parts; the tier is empty where nothing is offloaded."""

    kind: str
    stage: int = 0
    tier: str = ""


@dataclass(frozen=True)
class Recipe:
    """What a trainer is built from: the row, sequences of a micro-batch, micro-batches of a step.

    `swap` is a folder for what is on disk.
    """

    row: Row
    batch: int
    accumulation: int
    swap: str = ""
    precision: str = "bf16"

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights that compute."""
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[self.precision]


class Trainer(Protocol):
    """The three phases that are timed; each runs once a micro-batch."""

    def announce(self, last: bool) -> None:
        """Say, before a micro-batch, whether it is the last of its step."""

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of a micro-batch."""

    def backward(self, loss: Tensor) -> None:
        """Make gradients, averaged over ranks where the framework does so here."""

    def step(self) -> None:
        """After the last micro-batch: clip, update, clear the gradients."""

    def gathers(self) -> int | None:
        """Count how often parameters were gathered so far; None where nobody counts."""


class EngineTrainer:
    """A DeepSpeed engine, this project's or the original's: whichever this interpreter imports."""

    def __init__(self, model: GPT, recipe: Recipe) -> None:
        import deepspeed

        self.stage = recipe.row.stage
        largest = max(param.numel() for param in model.parameters())
        self.engine, *_ = deepspeed.initialize(
            model=model, model_parameters=list(model.parameters()), config=engine_config(recipe, largest)
        )

    def announce(self, last: bool) -> None:
        """Leave the count to the engine."""

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Run the engine on a micro-batch."""
        loss: Tensor = self.engine(ids, targets)
        return loss

    def backward(self, loss: Tensor) -> None:
        """Let the engine scale and differentiate."""
        self.engine.backward(loss)

    def step(self) -> None:
        """Let the engine update, at the end of a step."""
        self.engine.step()

    def gathers(self) -> int | None:
        """Ask this project's engine at stage 3; the original's does not count."""
        if self.stage < 3 or not hasattr(self.engine, "memory_report"):
            return None
        count: int = self.engine.memory_report().gathers
        return count


class TorchTrainer:
    """What the rows without an engine share: the loss scaled by hand, the update in the last micro-batch."""

    module: nn.Module

    def __init__(self, recipe: Recipe) -> None:
        self.accumulation = recipe.accumulation
        self.last = True

    def announce(self, last: bool) -> None:
        """Remember whether the update follows."""
        self.last = last

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Run the model, wrapped or not."""
        loss: Tensor = self.module(ids, targets)
        return loss

    def backward(self, loss: Tensor) -> None:
        """Differentiate this micro-batch's share; what wraps the model reduces while it goes."""
        (loss / self.accumulation).backward()

    def step(self) -> None:
        """Update after the last micro-batch."""
        if self.last:
            self.update()

    def update(self) -> None:
        """Clip, update, clear the gradients."""
        raise NotImplementedError

    def gathers(self) -> int | None:
        """Nobody counts."""
        return None


class AloneTrainer(TorchTrainer):
    """The classic hand-written mixed-precision step of one rank.

    The update casts bf16 gradients to fp32, clips, runs fused AdamW on the fp32 master weights and copies these
    back into the bf16 model. Of an fp32 model there are no masters.
    """

    def __init__(self, model: GPT, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.module = model.to(recipe.dtype)
        parameters = list(model.parameters())
        self.pairs = [(p, nn.Parameter(p.detach().float())) for p in parameters if p.dtype != torch.float32]
        self.updated = [master for _, master in self.pairs] or parameters
        self.optimizer = make_adamw(self.updated)

    @torch.no_grad()
    def update(self) -> None:
        """Update in fp32 and publish masters as bf16."""
        for parameter, master in self.pairs:
            master.grad = None if parameter.grad is None else parameter.grad.float()
        nn.utils.clip_grad_norm_(self.updated, CLIP)
        self.optimizer.step()
        for parameter, master in self.pairs:
            parameter.copy_(master)
        self.module.zero_grad()
        self.optimizer.zero_grad()


class DDPTrainer(AloneTrainer):
    """The same under DDP, which averages gradients in the last micro-batch, in the dtype of the model."""

    def __init__(self, model: GPT, recipe: Recipe) -> None:
        super().__init__(model, recipe)
        self.module = nn.parallel.DistributedDataParallel(self.module, gradient_as_bucket_view=True)

    def announce(self, last: bool) -> None:
        """Reduce in the last micro-batch only; what ``no_sync`` does, without its block."""
        super().announce(last)
        self.module.require_backward_grad_sync = last  # type: ignore[assignment]


class FSDP2Trainer(TorchTrainer):
    """fully_shard of every block and the root: sharded parameters, gradients and optimizer states.

    As in ZeRO-3, every micro-batch reduces its gradients, so that they stay sharded between them.
    """

    reshard = True

    def __init__(self, model: GPT, recipe: Recipe) -> None:
        super().__init__(recipe)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        policy = MixedPrecisionPolicy(param_dtype=recipe.dtype, reduce_dtype=recipe.dtype)
        for block in model.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=self.reshard)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        self.module = model
        self.optimizer = make_adamw(list(model.parameters()))

    def update(self) -> None:
        """Clip and update the shards."""
        nn.utils.clip_grad_norm_(self.module.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()


class FSDP2WholeTrainer(FSDP2Trainer):
    """FSDP2 that reduces in the last micro-batch only: faster, for whole gradients in memory until then."""

    def announce(self, last: bool) -> None:
        """Put off the reduction."""
        super().announce(last)
        self.module.set_requires_gradient_sync(last)  # type: ignore[operator]


class FSDP2LiveTrainer(FSDP2Trainer):
    """FSDP2 that gathers once a micro-batch, as engines do while the model is below their live limit."""

    reshard = False


class ComputeTrainer(TorchTrainer):
    """Forward and backward, gradients thrown away."""

    def __init__(self, model: GPT, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.module = model.to(recipe.dtype)

    def update(self) -> None:
        """Drop the gradients."""
        self.module.zero_grad()


TRAINERS: dict[str, Callable[[GPT, Recipe], Trainer]] = {
    "ours": EngineTrainer,
    "original": EngineTrainer,
    "ddp": DDPTrainer,
    "fsdp2": FSDP2Trainer,
    "fsdp2_whole": FSDP2WholeTrainer,
    "fsdp2_live": FSDP2LiveTrainer,
    "alone": AloneTrainer,
    "compute": ComputeTrainer,
}

# A row stands beside the row it is compared with, so that the two of a pair meet the same machine load.
OTHERS = ("ddp", "fsdp2", "alone", "compute")
DEFAULT_ROWS = (
    "ours:0", "original:0", "ours:1", "original:1", "ours:2", "original:2", "ours:3", "original:3", *OTHERS,
)  # fmt: skip

LABELS = {
    "ours": "this project, stage {}",
    "original": "original 0.19.8, stage {}",
    "ddp": "torch DDP",
    "fsdp2": "torch FSDP2",
    "fsdp2_whole": "torch FSDP2, one reduction",
    "fsdp2_live": "torch FSDP2, one gather",
    "alone": "one rank alone",
    "compute": "compute only",
}


def split_row(row: str) -> Row:
    """Split `kind[:stage[:tier]]` and check it."""
    kind, *rest = row.split(":")
    if kind in TRAINERS and _is_setting(rest, staged=kind in ("ours", "original")):
        return Row(kind, *map(int, rest[:1]), *rest[1:])
    engines = (
        f"ours:STAGE[:TIER], original:STAGE[:TIER] (stages 0 to 3; tiers {', '.join(TIERS)}, see tiers.py)"
    )
    others = ", ".join(name for name in TRAINERS if name not in ("ours", "original"))
    raise ValueError(f"row: expected one of {engines}, {others}, got {row!r}")


def _is_setting(rest: list[str], *, staged: bool) -> bool:
    if not staged or not rest:
        return not staged and not rest
    stage, *tiers = rest
    if stage not in ("0", "1", "2", "3") or len(tiers) > 1:
        return False
    return all(int(stage) in STAGES.get(tier, ()) for tier in tiers)


def label(row: str) -> str:
    """Name a row for the reader."""
    parts = split_row(row)
    name = LABELS[parts.kind].format(parts.stage)
    return f"{name}, {TIERS[parts.tier]}" if parts.tier else name


def make_trainer(recipe: Recipe, model: GPT) -> Trainer:
    """Build the trainer of a recipe around `model`."""
    return TRAINERS[recipe.row.kind](model, recipe)


def make_adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Build torch's fastest AdamW."""
    return torch.optim.AdamW(
        parameters, lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, fused=True
    )  # fmt: skip


def engine_config(recipe: Recipe, largest: int) -> dict[str, Any]:
    """Write the configuration both engines get; what it does not name stays at their defaults."""
    row = recipe.row
    return {
        "train_micro_batch_size_per_gpu": recipe.batch,
        "gradient_accumulation_steps": recipe.accumulation,
        "gradient_clipping": CLIP,
        "bf16": {"enabled": recipe.precision == "bf16"},
        "zero_optimization": {
            "stage": row.stage,
            **offload_sections(row.kind, row.tier, recipe.swap, largest),
        },
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": LR, "betas": list(BETAS), "eps": EPS, "weight_decay": WEIGHT_DECAY},
        },
    }
