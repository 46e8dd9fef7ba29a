"""One Accelerate training loop, run with and without DeepSpeed, and Accelerators that leave nothing behind."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.integrations import unset_hf_deepspeed_config
from twins import seeded

VOCABULARY = 37
GLOO = [
    InitProcessGroupKwargs(backend="gloo")
]  # without it Accelerate counts one process where there is no GPU


@contextmanager
def accelerating(plugins=None, environment=None, **options) -> Iterator[Accelerator]:
    """Give an Accelerator that knows nothing of earlier ones, and leave no trace of it.

    Args:
        plugins: a function that returns one or several; without one the Accelerator is for plain PyTorch.
        environment: variables that are set meanwhile.
        options: of the Accelerator.
    """
    kept = dict(os.environ)
    os.environ.update(environment or {})
    if plugins is None:
        options["cpu"] = True
    else:
        options["deepspeed_plugins"] = plugins()
    accelerator = Accelerator(kwargs_handlers=GLOO, **options)
    try:
        yield accelerator
    finally:
        accelerator.free_memory()
        forget()
        os.environ.clear()
        os.environ.update(kept)


def forget() -> None:
    """Forget what Accelerate and transformers keep for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    unset_hf_deepspeed_config()


def tiny_llama(*, tied: bool = True) -> nn.Module:
    """Return a Llama of two layers."""
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        vocab_size=VOCABULARY,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.2,
    )
    return seeded(3, lambda: transformers.AutoModelForCausalLM.from_config(config))


def sentences(count: int, length: int = 6) -> list[dict[str, Tensor]]:
    """Return samples for a causal language model, different for every index."""
    tokens = [(torch.arange(length) * (3 + index) + index) % VOCABULARY for index in range(count)]
    return [{"input_ids": one, "labels": one} for one in tokens]


def loader(count: int = 16, batch_size: int = 2) -> DataLoader:
    return DataLoader(sentences(count), batch_size=batch_size)


@dataclass
class Run:
    """What a training run went through, and where it ended."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)


def train(accelerator: Accelerator, model, optimizer, batches, schedule=None, *, clip=None) -> Run:
    """Train over `batches` as Accelerate's documentation says; everything has been prepared."""
    run = Run()
    model.train()
    for batch in batches:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients and clip is not None:
                run.norms.append(float(accelerator.clip_grad_norm_(model.parameters(), clip)))
            optimizer.step()
            if schedule is not None:
                schedule.step()
            optimizer.zero_grad()
        run.losses.append(loss.item())
        run.rates.append(optimizer.param_groups[0]["lr"])
    run.weights = whole_weights(accelerator, model)
    return run


def whole_weights(accelerator: Accelerator, model) -> dict[str, Tensor]:
    """Return copies of all weights by name; at stage 3 on the first rank only."""
    state = accelerator.get_state_dict(model)
    return {name.removeprefix("module."): value.clone() for name, value in (state or {}).items()}


def same(run: Run, expected: Run, *, tolerance: float = 2e-5) -> None:
    """Compare two runs step by step."""
    for name in ("losses", "norms", "rates"):
        torch.testing.assert_close(
            torch.tensor(getattr(run, name), dtype=torch.float64),
            torch.tensor(getattr(expected, name), dtype=torch.float64),
            rtol=tolerance,
            atol=tolerance,
            msg=lambda m, n=name: f"{n}: {m}",
        )
    if run.weights and expected.weights:
        assert set(run.weights) == set(expected.weights)
        for name, value in expected.weights.items():
            torch.testing.assert_close(
                run.weights[name],
                value,
                rtol=tolerance,
                atol=tolerance,
                msg=lambda m, n=name: f"{n}: {m}",
            )
