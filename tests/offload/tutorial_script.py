"""A training script as tutorials show it: everything about offload is in the configuration.

    python tutorial_script.py --deepspeed_config FILE --out FOLDER
    deepspeed --num_gpus 2 tutorial_script.py --deepspeed --deepspeed_config FILE --out FOLDER

Each rank writes what it saw to ``FOLDER/RANK.pt``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

import deepspeed
from deepspeed.utils import safe_get_full_fp32_param

WIDTH, TOKENS, STEPS = 64, 256, 5


class Model(nn.Module):
    """Predict each token's successor; it tells its width as models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(hidden_size=WIDTH)
        self.embed = nn.Embedding(TOKENS, WIDTH)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
            )
            for _ in range(2)
        )
        self.head = nn.Linear(WIDTH, TOKENS)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.head(hidden)


def make_model() -> Model:
    torch.manual_seed(0)
    return Model()


def loss_of(model, batch) -> Tensor:
    tokens, targets = batch
    return nn.functional.cross_entropy(model(tokens).float().flatten(0, 1), targets.flatten())


def main() -> None:
    parser = deepspeed.add_config_arguments(argparse.ArgumentParser())
    parser.add_argument("--local_rank", type=int, default=-1)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--auto", action="store_true", help="the configuration leaves the batch size open")
    args = parser.parse_args()

    model = make_model()
    lines = torch.randint(0, TOKENS, (64, 9), generator=torch.Generator().manual_seed(1))
    dataset = torch.utils.data.TensorDataset(lines[:, :-1], lines[:, 1:])
    data = torch.utils.data.DataLoader(dataset, batch_size=4) if args.auto else dataset
    engine, _, loader, _ = deepspeed.initialize(
        args=args, model=model, model_parameters=model.parameters(), training_data=data
    )
    seen = []
    for _, batch in zip(range(STEPS), loader, strict=False):
        loss = loss_of(engine, [one.to(engine.device) for one in batch])
        engine.backward(loss)
        engine.step()
        seen.append((batch, loss.detach().cpu()))
    result = {
        "seen": seen,
        "skipped": engine.skipped_steps,
        "lr": engine.get_lr()[0],
        "batch": (engine.train_batch_size(), engine.train_micro_batch_size_per_gpu()),
        "parameters": engine.memory_report().parameters,
        "masters": [safe_get_full_fp32_param(param).cpu() for param in engine.module.parameters()],
    }
    torch.save(result, args.out / f"{deepspeed.comm.get_rank()}.pt")
    engine.save_16bit_model(args.out, "model.bin")


if __name__ == "__main__":
    main()
