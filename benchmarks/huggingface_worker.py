"""One rank that trains with the Trainer, builds a model from files, or generates, and writes what it took as JSON.

Started by huggingface.py, which sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from meter import Memory, resident, write_record
from transformers.integrations import HfDeepSpeedConfig

import deepspeed

WARM_UP = 4
"""Steps that are not counted."""

STAGE_3 = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3},
    "bf16": {"enabled": True},
    "steps_per_print": 10**9,
}


class Windows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Random sequences that learn something: each is a short one again and again."""

    def __init__(self, vocabulary: int, length: int) -> None:
        self.vocabulary, self.length = vocabulary, length

    def __len__(self) -> int:
        return 4096

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        drawn = torch.randint(0, self.vocabulary, (7,), generator=torch.Generator().manual_seed(index))
        tokens = drawn.repeat(-(-self.length // 7))[: self.length]
        return {"input_ids": tokens, "labels": tokens}


class Clock(transformers.TrainerCallback):
    """When steps ended, and the weights before the first one."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.start: dict[str, torch.Tensor] = {}
        self.trainer: Any = None

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Keep the weights."""
        self.start = {name: value.clone() for name, value in self.weights().items()}

    def weights(self) -> dict[str, torch.Tensor]:
        """Return whole weights on the first rank."""
        return self.trainer.accelerator.get_state_dict(self.trainer.model_wrapped) or {}

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note the time."""
        self.ends.append(time.perf_counter())


def fine_tune(options: argparse.Namespace) -> dict[str, Any]:
    """Train a GPT-2 with the Trainer; the weights that come out are saved beside the record."""
    from accelerate import PartialState

    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")  # without a GPU Accelerate counts one rank otherwise
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True  # it allows bf16 on GPUs only
    config = transformers.GPT2Config(
        n_layer=6, n_embd=512, n_head=8, vocab_size=20000, n_positions=128, bos_token_id=0, eos_token_id=0
    )
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        setattr(config, name, 0.0)
    arguments = transformers.TrainingArguments(
        str(options.out / "trainer"),
        deepspeed={
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "bf16": {"enabled": "auto"},
            "zero_optimization": {
                "stage": options.stage,
                "stage3_gather_16bit_weights_on_model_save": True,
            },
            "optimizer": {
                "type": "AdamW",
                "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
            },
        },
        accelerator_config={"use_configured_state": True},
        per_device_train_batch_size=4,
        bf16=options.precision == "bf16",
        max_steps=WARM_UP + options.steps,
        learning_rate=1e-4,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_steps=10**6,
        dataloader_pin_memory=False,
        seed=0,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    clock = Clock()
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=Windows(20000, 128), callbacks=[clock]
    )
    clock.trainer = trainer
    trainer.train()
    steps = [
        after - before for before, after in zip(clock.ends[WARM_UP - 1 :], clock.ends[WARM_UP:], strict=False)
    ]
    assert isinstance(trainer.model_wrapped, deepspeed.DeepSpeedEngine)
    end = clock.weights()
    if dist.get_rank() == 0:
        torch.save({"start": clock.start, "end": end}, options.weights)
    return {
        "step": sorted(steps)[len(steps) // 2],
        "loss": float(trainer.state.log_history[-1]["train_loss"]),
    }


def load(options: argparse.Namespace) -> dict[str, Any]:
    """Build a model from files, sharded from the start."""
    deepspeed.init_distributed(dist_backend="gloo")
    kept = HfDeepSpeedConfig(STAGE_3)
    model_class = transformers.GPT2LMHeadModel  # imports what both need before the clock starts
    dist.barrier()
    memory, before = Memory(), resident()
    memory.restart()
    began = time.perf_counter()
    model = model_class.from_pretrained(options.model, dtype=torch.bfloat16)
    dist.barrier()
    seconds = time.perf_counter() - began
    del kept
    return {"seconds": seconds, "peak": memory.peak() - before, "parameters": model.num_parameters()}


def generate(options: argparse.Namespace) -> dict[str, Any]:
    """Generate with a model that is sharded over the ranks."""
    deepspeed.init_distributed(dist_backend="gloo")
    kept = HfDeepSpeedConfig(STAGE_3)
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
    engine, *_ = deepspeed.initialize(model=model, config=STAGE_3)
    engine.eval()
    prompt = torch.arange(1, 9)[None]
    chosen = {"do_sample": False, "synced_gpus": True, "pad_token_id": 0, "eos_token_id": None}
    engine.module.generate(prompt, max_new_tokens=4, **chosen)
    dist.barrier()
    began = time.perf_counter()
    tokens = engine.module.generate(prompt, max_new_tokens=64, **chosen)
    seconds = time.perf_counter() - began
    del kept
    return {"seconds": seconds, "tokens": tokens[0].tolist()}


TASKS = {"fine_tune": fine_tune, "load": load, "generate": generate}


def main() -> None:
    """Do the task and write `OUT/rankR.json`."""
    options = parse()
    record = TASKS[options.task](options)
    record["versions"] = {
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "deepspeed": str(deepspeed.__version__),
    }
    write_record(options.out, dist.get_rank(), record)
    dist.barrier()
    dist.destroy_process_group()


def parse() -> argparse.Namespace:
    """Read the command line huggingface.py writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--stage", type=int, default=3)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--model", default="", help="folder of the model's files")
    parser.add_argument("--weights", default="", help="where the trained weights go")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
