"""Generate text from a transformers model that lies in shards, and check it against the whole model.

    deepspeed --num_gpus 2 examples/generate_zero3.py --prompt "Generate"

A tiny GPT-2 made from a configuration (nothing is downloaded) first learns the line above by heart, at ZeRO stage 3.
Then it writes: `generate` is called on the sharded model as on any other, and each block is gathered when it is
its turn. Last, rank 0 puts a whole copy together and lets it write the same. Needs ``pip install transformers``.
"""

from __future__ import annotations

import argparse
import copy
import sys

import numpy as np
import torch
from gpt.data import Windows
from gpt.steps import run_steps
from torch import Tensor, nn

import deepspeed
from deepspeed import comm
from deepspeed.utils import RepeatingLoader

try:
    import transformers
except ImportError:
    sys.exit("generate_zero3: transformers is not installed; pip install transformers")

SEQ, BYTES = 128, 256
CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    "optimizer": {"type": "AdamW", "params": {"lr": 2e-3}},
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 1000},
}

TEXT = str(__doc__).partition("\n")[0] + "\n"
PLAIN = {
    **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
    **dict.fromkeys(("bos_token_id", "eos_token_id")),
}


def main() -> int:
    """Train a little, generate, compare; return the exit code."""
    args = parse()
    transformers.set_seed(0)
    config = transformers.GPT2Config(
        vocab_size=BYTES, n_positions=SEQ, n_embd=128, n_layer=3, n_head=4, **PLAIN
    )
    with deepspeed.zero.Init(config_dict_or_path=CONFIG):
        model = transformers.GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # what transformers takes anyway, with a warning
    data = np.frombuffer(TEXT.encode() * 80, dtype=np.uint8).copy()
    engine, _, loader, _ = deepspeed.initialize(
        model=model, training_data=Windows(data, len(TEXT)), config=CONFIG
    )
    batches = iter(RepeatingLoader(loader))
    run_steps(engine, batches, args.steps, lambda tokens, _: engine(input_ids=tokens, labels=tokens).loss)

    prompt = torch.tensor([list(args.prompt.encode() or b"\n")], device=engine.device)
    sharded = write(engine.module, prompt, args.bytes)
    same = torch.equal(write(whole_copy(engine.module, config), prompt, args.bytes), sharded)
    if comm.get_rank() == 0:
        print(f"\n{bytes(sharded[0].tolist()).decode(errors='replace')}\n")
        print(f"The whole model writes {'the same' if same else 'something else'}.")
    engine.destroy()
    comm.destroy_process_group()
    return 0 if same else 1


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Generate from a model in shards.")
    add = parser.add_argument
    add("--prompt", default="Generate", help="what the text starts with (%(default)r)")
    add("--bytes", type=int, default=len(TEXT) - 9, help="how much to write (%(default)s)")
    add("--steps", type=int, default=60, help="optimizer steps before (%(default)s)")
    add("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # some launchers pass it
    return parser.parse_args()


@torch.no_grad()
def write(model: nn.Module, prompt: Tensor, count: int) -> Tensor:
    """Continue `prompt` (1, length) by `count` bytes, each the likeliest."""
    mask = torch.ones_like(prompt)
    return model.eval().generate(
        prompt, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0
    )


def whole_copy(model: nn.Module, config: transformers.PretrainedConfig) -> nn.Module:
    """Return a model that no engine knows, with the same weights; every rank must call it."""
    whole = transformers.GPT2LMHeadModel(copy.deepcopy(config)).to(model.device)
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        whole.load_state_dict(model.state_dict())
    return whole


if __name__ == "__main__":
    sys.exit(main())
