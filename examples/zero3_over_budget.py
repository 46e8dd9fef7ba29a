"""Train a model whose weights and optimizer states do not fit on one rank.

    python examples/zero3_over_budget.py                       one rank: refused, with the number of ranks it takes
    deepspeed --num_gpus 2 examples/zero3_over_budget.py       two ranks: each holds half, and it trains

The budget is artificial (--budget, in MiB), what is compared with it is real: the bytes of the tensors that the
engine keeps on this rank. Under `zero.Init` no rank ever holds the whole model, not even while it is built.
"""

from __future__ import annotations

import argparse
import sys

import torch
from gpt.data import Windows, load_corpus
from gpt.model import GPT, Shape
from gpt.steps import run_steps

import deepspeed
from deepspeed import comm
from deepspeed.utils import RepeatingLoader

MIB = 2**20
MOMENTS = 2 * 4  # bytes: Adam keeps two fp32 numbers for each one it updates, from the first step on
CONFIG = {
    "train_micro_batch_size_per_gpu": 8,
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 2e-3, "betas": [0.9, 0.95], "weight_decay": 0.1}},
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 1000,  # only norms stay whole
        "stage3_max_reuse_distance": 0,  # a block is released after its forward, and gathered again for backward
        "stage3_prefetch_bucket_size": 500_000,  # elements: about one block ahead
    },
}


def main() -> int:
    """Build, compare with the budget, train; return the exit code."""
    args = parse()
    text = load_corpus(args.data, args.seq)
    torch.manual_seed(0)
    with deepspeed.zero.Init(config_dict_or_path=CONFIG):
        model = GPT(Shape(args.layers, args.dim, heads=4, seq=args.seq))
    windows = Windows(text.train, args.seq)
    engine, _, loader, _ = deepspeed.initialize(model=model, training_data=windows, config=CONFIG)
    need = held(engine) + MOMENTS * sum(unit.master.numel() for unit in engine.optimizer.units)
    fits = need <= args.budget * MIB
    if fits:
        run_steps(engine, iter(RepeatingLoader(loader)), args.steps, engine)
        assert held(engine) == need, f"{held(engine)} bytes are held, {need} were expected"
    if comm.get_rank() == 0:
        say(engine, args.budget, need, fits)
    comm.barrier()  # a launcher ends the other ranks as soon as one has failed
    engine.destroy()
    comm.destroy_process_group()
    return 0 if fits else 2


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train a model that does not fit on one rank.")
    add = parser.add_argument
    add(
        "--budget",
        type=float,
        default=24,
        help="MiB of weights and optimizer states a rank may hold (%(default)s)",
    )
    add("--steps", type=int, default=30, help="optimizer steps (%(default)s)")
    add("--layers", type=int, default=6, help="transformer layers (%(default)s)")
    add("--dim", type=int, default=192, help="model width (%(default)s)")
    add("--seq", type=int, default=128, help="bytes in one sequence (%(default)s)")
    add("--data", nargs="+", default=[], metavar="PATH", help="files or folders of text (Python's own)")
    add("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # some launchers pass it
    return parser.parse_args()


def held(engine: deepspeed.DeepSpeedEngine) -> int:
    """Bytes of weights, master weights and optimizer states that this rank keeps between uses."""
    report = engine.memory_report()
    states = [value for state in engine.optimizer.state.values() for value in state.values()]
    moments = [one for one in states if isinstance(one, torch.Tensor) and one.dim() > 0]
    return report.parameters + report.masters + sum(one.nbytes for one in moments)


def say(engine: deepspeed.DeepSpeedEngine, budget: float, need: int, fits: bool) -> None:
    """Print one sentence on how it ended."""
    ranks = comm.get_world_size()
    weights = sum(param.numel() for param in engine.module.parameters())
    where = f"each of {ranks} ranks" if ranks > 1 else "one rank"
    what = f"{weights:,} weights and their optimizer states take {need / MIB:.1f} MiB on {where}"
    if fits:
        gathered = engine.optimizer.parameter_offload.meter.peak_nbytes
        print(
            f"{what}, within the budget of {budget:g} MiB; at most {gathered / MIB:.1f} MiB more were gathered at once."
        )
    else:
        enough = -(-need * ranks // int(budget * MIB))
        print(f"{what}, above the budget of {budget:g} MiB; use --num_gpus {enough}.", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
