"""Tiny transformers models from configurations, and the Trainer around them, on ranks without a GPU."""

from __future__ import annotations

import copy
import gc
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import transformers
from accelerate import PartialState
from accelerating import forget
from torch import Tensor, nn

from deepspeed.zero import GatheredParameters

VOCABULARY = 50
THIRD_PARTY_NOISE = (
    (UserWarning, "'pin_memory' argument is set as true but no accelerator"),
    (FutureWarning, "`torch.distributed.reduce_op` is deprecated"),
)


@contextmanager
def hugging_face(*, deepspeed: bool = True) -> Iterator[None]:
    """What a launched script has around it; Accelerate and transformers forget everything at the end.

    Accelerate counts ranks without a GPU only when the first `PartialState` names gloo, and transformers wants a
    GPU for bf16.

    Args:
        deepspeed: False gives every rank a world of its own.
    """
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with warnings.catch_warnings():
        for kind, message in THIRD_PARTY_NOISE:
            warnings.filterwarnings("ignore", message, kind)
        with (
            mock.patch.dict(os.environ, {"ACCELERATE_USE_DEEPSPEED": str(deepspeed).lower()}),
            mock.patch("transformers.training_args.is_torch_bf16_gpu_available", return_value=True),
        ):
            PartialState(backend="gloo" if deepspeed and dist.get_world_size() > 1 else None)
            try:
                yield
            finally:
                forget()
                transformers.logging.set_verbosity(level)


class Tokens(torch.utils.data.Dataset):
    """Sequences of tokens, all different and as long as each other."""

    def __init__(self, count: int = 32, length: int = 8) -> None:
        self.tokens = torch.randint(
            0, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(1)
        )

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def llama_config(**changes: Any) -> transformers.PretrainedConfig:
    """Two layers of width 16."""
    return transformers.LlamaConfig(
        **{
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 32,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            **changes,
        }
    )


def causal_model(config: Any = None) -> Any:
    """Return a causal model whose weights are always the same."""
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config or llama_config())


def ds_config(stage: int, **changes: Any) -> dict[str, Any]:
    """Return the configuration that transformers' documentation shows: everything "auto"."""
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "fp16": {"enabled": "auto"},
        "bf16": {"enabled": "auto"},
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        **copy.deepcopy(changes),
    }


OPTIMIZER: dict[str, Any] = {
    "type": "AdamW",
    "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
}
SCHEDULER: dict[str, Any] = {
    "type": "WarmupDecayLR",
    "params": {
        "total_num_steps": "auto",
        "warmup_min_lr": "auto",
        "warmup_max_lr": "auto",
        "warmup_num_steps": "auto",
        "warmup_type": "linear",
    },
}


def arguments(folder: Path | str, deepspeed: Any = None, **changes: Any) -> Any:
    """Return arguments of a quiet Trainer: 4 steps of 2 samples per rank."""
    return transformers.Seq2SeqTrainingArguments(
        **{
            "output_dir": str(folder),
            "deepspeed": deepspeed,
            "per_device_train_batch_size": 2,
            "max_steps": 4,
            "learning_rate": 1e-2,
            "warmup_steps": 2,
            "adam_epsilon": 1e-4,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "accelerator_config": {"use_configured_state": True},
            **changes,
        }
    )


def trainer(
    folder: Path | str,
    deepspeed: Any = None,
    model: Any = None,
    kind: type[transformers.Trainer] = transformers.Trainer,
    data: Any = None,
    **changes: Any,
) -> Any:
    """Return a Trainer of `model` (a module, or what makes one) on `data`; a tiny Llama on `Tokens`."""
    args = arguments(folder, deepspeed, **changes)  # before the model: it switches zero.Init on
    made = kind(
        model=model if isinstance(model, nn.Module) else (model or causal_model)(),
        args=args,
        train_dataset=data or Tokens(),
        eval_dataset=data or Tokens(16),
    )
    made.remove_callback(transformers.PrinterCallback)
    return made


def losses(trained: Any) -> list[float]:
    """Return the training losses that a Trainer logged."""
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]


def whole(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of all parameters, in fp32."""
    model = getattr(model, "module", model)
    with GatheredParameters(model.parameters()):
        return {name: param.detach().float().clone() for name, param in model.named_parameters()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 0.0) -> None:
    """Compare two sets of named tensors."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_moved_alike(
    start: dict[str, Tensor], actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float
) -> None:
    """Compare what training did to weights: the difference, as a part of the way from the start."""
    assert actual.keys() == expected.keys()
    apart = sum((actual[name] - value).square().sum() for name, value in expected.items())
    way = sum((start[name] - value).square().sum() for name, value in expected.items())
    assert (apart / way).sqrt() < tolerance


def everywhere(value: Any) -> list[Any]:
    """Return what every rank gives."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def plain(
    folder: Path | str,
    start: dict[str, Tensor],
    model: Any = None,
    factors: list[float] | None = None,
    **changes: Any,
) -> tuple[list[float], dict[str, Tensor]]:
    """Return (losses, weights) of a Trainer without DeepSpeed and without ranks, from the same start.

    Args:
        start: weights.
        model: of which architecture; a tiny Llama.
        factors: of the learning rate in each step; None: the Trainer's own schedule.
    """
    with hugging_face(deepspeed=False):
        model = causal_model() if model is None else model
        model.load_state_dict(start, strict=False)
        alone = trainer(folder, model=model, **changes)
        if factors is not None:
            alone.create_optimizer()
            alone.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                alone.optimizer, lambda step: factors[min(step, len(factors) - 1)]
            )
        alone.train()
        return losses(alone), whole(alone.model)


gc.collect()
gc.freeze()  # the Trainer collects garbage often, and would look through what transformers imports each time
