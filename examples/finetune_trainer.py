"""Fine-tune a transformers model with the Trainer, which hands it to DeepSpeed.

    accelerate launch --use_deepspeed --num_processes 2 examples/finetune_trainer.py

Without ``--model FOLDER`` a tiny Llama is made from a configuration (nothing is downloaded); it learns the help texts
of Python, byte by byte. On GPUs the lines about the CPU do nothing. Needs ``pip install transformers accelerate``.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch
from torch.utils.data import Dataset

try:
    import transformers
    from accelerate import PartialState
except ImportError as missing:
    sys.exit(f"finetune_trainer: {missing.name} is not installed; pip install transformers accelerate")

HERE = Path(__file__).parent
SEQ, BYTES, HELD_OUT = 128, 256, 16


class Windows(Dataset[dict[str, torch.Tensor]]):
    """Pieces of a text, each `SEQ` bytes.

    Args:
        text: the bytes.
    """

    def __init__(self, text: bytes) -> None:
        self._tokens = torch.tensor(list(text[: len(text) // SEQ * SEQ])).view(-1, SEQ)

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self._tokens[index], "labels": self._tokens[index]}


def main() -> None:
    """Train, evaluate, and save the whole model."""
    args = parse()
    if not torch.accelerator.is_available():
        PartialState(backend="gloo")  # or Accelerate takes each rank of a CPU machine for the only one
    transformers.set_seed(0)
    arguments = transformers.TrainingArguments(
        args.output,
        deepspeed=args.deepspeed_config,
        accelerator_config={"use_configured_state": not torch.accelerator.is_available()},
        per_device_train_batch_size=8,
        per_device_eval_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=2e-3,
        max_grad_norm=1.0,
        warmup_steps=5,
        max_steps=args.steps,
        logging_steps=max(args.steps // 5, 1),
        save_strategy="no",
        bf16=torch.accelerator.is_available(),
        dataloader_pin_memory=torch.accelerator.is_available(),
        report_to=[],
    )
    model = make_model(args.model)
    training, held_out = texts()
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=Windows(training), eval_dataset=Windows(held_out)
    )
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    if trainer.is_world_process_zero():
        print(f"{after / math.log(2):.2f} bits per byte on {HELD_OUT} pages that it never saw")
        print(f"The whole weights are in {args.output}, for from_pretrained.")


def make_model(folder: str | None) -> transformers.PreTrainedModel:
    """Read a model, or make a tiny one; both after TrainingArguments, so that stage 3 shards it from the start."""
    if folder is not None:
        return transformers.AutoModelForCausalLM.from_pretrained(folder)
    config = transformers.LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=BYTES,
        max_position_embeddings=SEQ,
        bos_token_id=None,
        eos_token_id=None,
    )
    return transformers.AutoModelForCausalLM.from_config(config)


def texts() -> tuple[bytes, bytes]:
    """Return the help texts of Python, without and with the last pages."""
    from pydoc_data.topics import topics

    pages = [topics[name].encode() for name in sorted(topics)]
    return b"".join(pages[:-HELD_OUT]), b"".join(pages[-HELD_OUT:])


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Fine-tune with transformers' Trainer.")
    add = parser.add_argument
    add("--model", metavar="FOLDER", help="of a model to fine-tune; default: a tiny new one")
    add("--steps", type=int, default=60, help="optimizer steps (%(default)s)")
    add("--output", default="runs/trainer", metavar="FOLDER", help="where the model goes (%(default)s)")
    add(
        "--deepspeed_config",
        default=str(HERE / "ds_config_auto.json"),
        metavar="FILE",
        help="whose values 'auto' the Trainer fills in (%(default)s)",
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
