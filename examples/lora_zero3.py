"""Fine-tune a transformers model with LoRA, its frozen weights sharded by ZeRO stage 3.

    deepspeed --num_gpus 2 examples/lora_zero3.py                        a tiny GPT-2
    deepspeed --num_gpus 2 examples/lora_zero3.py --architecture llama   a tiny Llama

The model is made from a configuration (nothing is downloaded) and learns the bytes of this file. peft is used as
it is: its adapters are small parameters beside the frozen ones, and only they are trained and saved. Needs
``pip install transformers peft``.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from gpt.data import Windows
from gpt.steps import run_steps
from torch import nn

import deepspeed
from deepspeed import comm
from deepspeed.utils import RepeatingLoader

try:
    import peft
    import transformers
except ImportError as missing:
    sys.exit(f"lora_zero3: {missing.name} is not installed; pip install transformers peft")

SEQ, BYTES = 64, 256
CONFIG = {
    "train_micro_batch_size_per_gpu": 8,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 1000},
}


def main() -> None:
    """Build, fine-tune, save the adapter."""
    args = parse()
    transformers.set_seed(0)
    warnings.filterwarnings(
        "ignore", "`is_gradient_check", FutureWarning
    )  # peft asks transformers by an old name
    with deepspeed.zero.Init(config_dict_or_path=CONFIG):
        base = transformers.AutoModelForCausalLM.from_config(tiny(args.architecture))
    base.loss_type = "ForCausalLM"  # what transformers takes anyway, with a warning
    adapter = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=8,
        lora_alpha=16,
        target_modules=TARGETS[args.architecture],
        fan_in_fan_out=args.architecture == "gpt2",  # its layers are Conv1D, whose weights are transposed
    )
    model = peft.get_peft_model(base, adapter)
    data = np.fromfile(__file__, dtype=np.uint8)
    engine, _, loader, _ = deepspeed.initialize(model=model, training_data=Windows(data, SEQ), config=CONFIG)
    batches = iter(RepeatingLoader(loader))
    run_steps(engine, batches, args.steps, lambda tokens, _: engine(input_ids=tokens, labels=tokens).loss)
    save_adapter(engine.module, Path(args.output))
    engine.destroy()
    comm.destroy_process_group()


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Fine-tune with LoRA at ZeRO stage 3.")
    add = parser.add_argument
    add("--architecture", choices=sorted(TARGETS), default="gpt2", help="of the tiny model (%(default)s)")
    add("--steps", type=int, default=40, help="optimizer steps (%(default)s)")
    add("--output", default="runs/lora", metavar="FOLDER", help="where the adapter goes (%(default)s)")
    add("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # some launchers pass it
    return parser.parse_args()


TARGETS = {"gpt2": ["c_attn", "c_fc"], "llama": ["q_proj", "v_proj", "up_proj"]}


def tiny(architecture: str) -> transformers.PretrainedConfig:
    """Return the configuration of a model over bytes that a CPU trains in seconds."""
    shared = {"vocab_size": BYTES, "bos_token_id": None, "eos_token_id": None, "initializer_range": 0.1}
    if architecture == "gpt2":
        return transformers.GPT2Config(n_positions=SEQ, n_embd=128, n_layer=3, n_head=4, **shared)
    return transformers.LlamaConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=SEQ,
        **shared,
    )


def save_adapter(model: peft.PeftModel, folder: Path) -> None:
    """Save the adapter whole, as peft would; the frozen weights stay where they are."""
    adapter = [param for param in model.parameters() if param.requires_grad]
    with deepspeed.zero.GatheredParameters(adapter):  # every rank takes part, the first one writes
        if comm.get_rank() == 0:
            model.save_pretrained(folder)
    if comm.get_rank() == 0:
        print(
            f"Saved {count(adapter):,} of {count(model.parameters()):,} weights, the adapter, in {folder}/; load them "
            f'with peft.PeftModel.from_pretrained(base_model, "{folder}").'
        )


def count(params: Iterable[nn.Parameter]) -> int:
    """Count the elements of parameters."""
    return sum(param.numel() for param in params)


if __name__ == "__main__":
    main()
