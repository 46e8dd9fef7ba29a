"""What the checkpoints under tests/checkpoint/original are of: models, settings and data."""

from __future__ import annotations

import torch
from torch import Tensor, nn

WORDS, WIDTH = 9, 5
STEPS, MORE = 2, 2
SCHEDULE = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.02, "warmup_num_steps": 4}}
ADAM = {"lr": 0.01, "betas": [0.9, 0.95], "weight_decay": 0.1, "torch_adam": True}

CASES = {
    "stage0-fp32": {"stage": 0},
    "stage0-bf16": {"stage": 0, "precision": "bf16"},
    "stage0-fp16": {
        "stage": 0,
        "precision": "fp16",
        "power": 0,
    },  # the original forgets to scale the loss there
    "stage1-bf16": {"stage": 1, "precision": "bf16", "tied": True},
    "stage1-fp16-groups": {"stage": 1, "precision": "fp16", "groups": True},
    "stage1-bf16-wide": {"stage": 1, "precision": "bf16", "groups": True, "accumulate": "fp32"},
    "stage2-fp32": {"stage": 2},
    "stage2-bf16": {"stage": 2, "precision": "bf16", "frozen": True},
    "stage2-bf16-left-out": {"stage": 2, "precision": "bf16", "frozen": True, "left_out": True},
    "stage2-bf16-3ranks": {"stage": 2, "precision": "bf16", "groups": True, "tied": True, "ranks": 3},
    "stage2-fp16-1rank": {"stage": 2, "precision": "fp16", "ranks": 1},
    "stage2-fp32-sgd": {"stage": 2, "client": "sgd"},
    "stage3-fp32": {"stage": 3, "sub_group_size": 40},
    "stage3-bf16": {"stage": 3, "precision": "bf16", "tied": True},
    "stage3-bf16-left-out": {"stage": 3, "precision": "bf16", "frozen": True, "left_out": True},
    "stage3-bf16-3ranks": {"stage": 3, "precision": "bf16", "groups": True, "frozen": True, "ranks": 3},
    "stage3-fp16": {"stage": 3, "precision": "fp16", "client": "adam"},
}
"""By name of the folder."""


class Words(nn.Module):
    """Tell the next word; sizes that no number of ranks divides, a parameter of one element, a buffer.

    Args:
        tied: the head shares the embedding's weight.
        frozen: the inner layer does not train.
    """

    def __init__(self, *, tied: bool = False, frozen: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.inner = nn.Linear(WIDTH, 7)
        self.outer = nn.Linear(7, WIDTH)
        self.gain = nn.Parameter(torch.tensor([1.3]))
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.register_buffer("shift", torch.linspace(-1, 1, WIDTH))
        if tied:
            self.head.weight = self.embed.weight
        if frozen:
            self.inner.requires_grad_(False)

    def forward(self, words: Tensor) -> Tensor:
        hidden = self.embed(words)
        hidden = hidden + self.outer(torch.tanh(self.inner(hidden)))
        return self.head(hidden * self.gain + self.shift.to(hidden.dtype))


def make_words(seed: int = 0, **options) -> Words:
    """Return a model whose weights depend on the seed only."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Words(**options)


def words_loss(model, step: int, rank: int) -> Tensor:
    """Mean cross-entropy on data that depends on step and rank."""
    words = torch.randint(0, WORDS, (3, 5), generator=torch.Generator().manual_seed(1 + step * 100 + rank))
    logits = model(words[:, :-1]).float()
    return nn.functional.cross_entropy(logits.reshape(-1, WORDS), words[:, 1:].reshape(-1))


def case_model(case: dict, seed: int = 0) -> Words:
    """Return the model of a case."""
    return make_words(seed, tied=case.get("tied", False), frozen=case.get("frozen", False))


def case_groups(case: dict, model: nn.Module) -> list:
    """Return the parameters to train: those with one dimension or none in a group without decay, where asked."""
    params = [param for param in model.parameters() if param.requires_grad]
    if not case.get("groups"):
        return params
    return [
        {"params": [param for param in params if param.dim() > 1], "weight_decay": 0.3},
        {"params": [param for param in params if param.dim() <= 1], "weight_decay": 0.0, "lr": 0.005},
    ]


def case_optimizer(case: dict, model: nn.Module) -> torch.optim.Optimizer | None:
    """Return the optimizer that the user made, if that is what the case is about."""
    if case.get("client") == "sgd":
        return torch.optim.SGD(case_groups(case, model), lr=0.05)
    if case.get("client") == "adam":
        return torch.optim.Adam(case_groups(case, model), lr=0.01, amsgrad=True)
    return None


def case_config(case: dict) -> dict:
    """Return the configuration of a case."""
    precision = case.get("precision", "fp32")
    zero = {"stage": case["stage"]}
    if case["stage"] == 3:
        zero |= {"stage3_param_persistence_threshold": 6, "sub_group_size": case.get("sub_group_size", 10**9)}
    config = {
        "train_micro_batch_size_per_gpu": 3,
        "gradient_clipping": 0.5,
        "zero_optimization": zero,
        "scheduler": SCHEDULE,
    }
    if "client" not in case:
        config["optimizer"] = {"type": "AdamW", "params": ADAM}
    if precision != "fp32":
        config[precision] = {"enabled": True}
    if precision == "fp16":
        power = case.get("power", 8)
        config["fp16"] |= {"initial_scale_power": power, "loss_scale_window": 3 if power else 1000}
    if "accumulate" in case:
        config["data_types"] = {"grad_accum_dtype": case["accumulate"]}
    if "client" in case:
        config["zero_allow_untested_optimizer"] = True
    return config
