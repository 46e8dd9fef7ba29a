"""Fine-tune a transformers model in a loop of your own with Accelerate, which hands it to DeepSpeed.

    accelerate launch --use_deepspeed --zero_stage 2 --num_processes 2 examples/finetune_accelerate.py

A tiny GPT-2 is made from a configuration (nothing is downloaded) and learns the help texts of Python, byte by byte.
It stops half way and resumes from what it saved. Needs ``pip install transformers accelerate``.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, TensorDataset

try:
    import transformers
    from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
except ImportError as missing:
    sys.exit(f"finetune_accelerate: {missing.name} is not installed; pip install transformers accelerate")

SEQ, BYTES, ACCUMULATION = 128, 256, 2


def main() -> None:
    """Train half of the steps, save, resume in a new model, train the others."""
    args = parse()
    accelerator = make_accelerator()
    half = args.steps // 2
    model, optimizer, scheduler, batches = prepare(accelerator, args.steps)
    train(accelerator, model, optimizer, scheduler, itertools.islice(batches, half * ACCUMULATION))
    accelerator.save_state(args.output)
    accelerator.free_memory(model, optimizer, scheduler)

    model, optimizer, scheduler, batches = prepare(accelerator, args.steps)
    accelerator.load_state(args.output)
    rest = itertools.islice(batches, half * ACCUMULATION, args.steps * ACCUMULATION)
    train(accelerator, model, optimizer, scheduler, rest)
    whole = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(args.output, state_dict=whole)
    accelerator.print(f"The whole weights are in {args.output}, for from_pretrained.")
    accelerator.end_training()


def make_accelerator() -> Accelerator:
    """Take the launcher's settings, or ZeRO stage 2 without any."""
    on_cpu = not torch.accelerator.is_available()
    return Accelerator(
        gradient_accumulation_steps=ACCUMULATION,
        deepspeed_plugin=DeepSpeedPlugin(
            gradient_accumulation_steps=ACCUMULATION,
            gradient_clipping=1.0,
            zero3_save_16bit_model=True,  # stage 3 gives whole weights only if asked beforehand
        ),
        # or Accelerate takes each rank of a CPU machine for the only one
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if on_cpu else None,
    )


def prepare(
    accelerator: Accelerator, steps: int
) -> tuple[torch.nn.Module, object, object, Iterator[list[torch.Tensor]]]:
    """Return model, optimizer, schedule and batches, as Accelerate wraps them."""
    transformers.set_seed(0)
    config = transformers.GPT2Config(
        n_layer=2, n_embd=128, n_head=4, vocab_size=BYTES, n_positions=SEQ, bos_token_id=0, eos_token_id=0
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.loss_type = "ForCausalLM"  # what transformers takes anyway, with a warning
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    scheduler = transformers.get_linear_schedule_with_warmup(optimizer, 5, steps * accelerator.num_processes)
    loader = DataLoader(TensorDataset(windows()), batch_size=8, shuffle=True)
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)
    return model, optimizer, scheduler, itertools.chain.from_iterable(itertools.repeat(loader))


def train(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: object,
    scheduler: object,
    batches: Iterator[list[torch.Tensor]],
) -> None:
    """Train on some batches, `ACCUMULATION` of them a step."""
    for number, (tokens,) in enumerate(batches, 1):
        with accelerator.accumulate(model):
            loss = model(input_ids=tokens, labels=tokens).loss
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if number % (5 * ACCUMULATION) == 0:
            mean = accelerator.reduce(loss.detach(), reduction="mean")
            accelerator.print(f"step {number // ACCUMULATION}  loss {float(mean):.3f}")


def windows() -> torch.Tensor:
    """Return the help texts of Python, `SEQ` bytes a row."""
    from pydoc_data.topics import topics

    text = "".join(topics[name] for name in sorted(topics)).encode()
    return torch.tensor(list(text[: len(text) // SEQ * SEQ])).view(-1, SEQ)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Fine-tune with Accelerate.")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps (%(default)s)")
    parser.add_argument(
        "--output", default="runs/accelerate", metavar="FOLDER", help="where the model goes (%(default)s)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
