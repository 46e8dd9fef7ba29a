"""Run a TRL trainer on the ranks of this process, with DeepSpeed or as plain data parallel training."""

from __future__ import annotations

import gc
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from accelerating import forget
from torch import Tensor

THEIRS = r"(accelerate|datasets|peft|tokenizers|torch|transformers|trl)\."
"""Whose warnings are not ours to heed."""

ARGUMENTS: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 3,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "adam_epsilon": 1e-3,  # gradients that are zero but for rounding (biases of keys) are not blown up
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "bf16": False,
    "dataloader_pin_memory": False,
    "ddp_backend": "gloo",
    "activation_checkpointing": False,
}


def zero_config(stage: int) -> dict[str, Any]:
    """Return a configuration whose numbers the trainer fills in; everything is released between uses."""
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
    }


@dataclass
class Trained:
    """What a run left: the log's losses and gradient norms, all weights, whole, and the trainer itself."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]
    trainer: Any


def trained(make: Callable[[dict[str, Any]], Any], stage: int | None, **changes: Any) -> Trained:
    """Train what `make(arguments of the trainer's config)` returns.

    Args:
        make: builds the trainer.
        stage: of ZeRO; None trains without DeepSpeed.
        changes: to the arguments.
    """
    with fresh_state(deepspeed=stage is not None), tempfile.TemporaryDirectory() as folder:
        arguments = {"output_dir": folder, **ARGUMENTS, **changes}
        if stage is None:
            arguments["use_cpu"] = True
        else:
            arguments["deepspeed"] = zero_config(stage)
            arguments["accelerator_config"] = {"use_configured_state": True}
        trainer = make(arguments)
        trainer.train()
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        return Trained(
            [entry["loss"] for entry in log],
            [float(entry["grad_norm"]) for entry in log],
            weights or {},
            trainer,
        )


@contextmanager
def fresh_state(*, deepspeed: bool) -> Iterator[None]:
    """Let Accelerate begin anew: what it remembers of the process is per process, not per trainer."""
    forget()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=THEIRS)
        if deepspeed:
            os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
            PartialState(backend="gloo")
        try:
            yield
        finally:
            os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
            forget()
            gc.collect()


def assert_same(ours: Trained, plain: Trained, tolerance: float = 1e-5) -> None:
    """Compare losses, norms and weights of two runs."""
    torch.testing.assert_close(ours.losses, plain.losses, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ours.norms, plain.norms, rtol=tolerance * 10, atol=tolerance)
    if not ours.weights:  # not on this rank
        return
    assert list(ours.weights) == [name.removeprefix("module.") for name in plain.weights]
    for ours_value, (name, value) in zip(ours.weights.values(), plain.weights.items(), strict=True):
        torch.testing.assert_close(
            ours_value, value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
