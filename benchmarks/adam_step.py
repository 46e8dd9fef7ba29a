"""Time one Adam step on 33.5M parameters: bf16 gradient in, bf16 weight out, one thread.

    python benchmarks/adam_step.py [--numel N] [--rounds R]

Rows run in turn, round by round: cast + torch's fused AdamW + cast (the base of the ratio), this project's
chunked pass, and its compiled pass where a compiler is present.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from deepspeed.ops.adam import FusedAdam
from deepspeed.ops.adam import compiled as compiled_path

Step = Callable[[], None]


def naive(numel: int) -> Step:
    """Cast the gradient to fp32, update with torch's fused kernel, cast the weight to bf16."""
    weight, m, v = torch.randn(numel), torch.zeros(numel), torch.zeros(numel)
    grad, out = torch.randn(numel).bfloat16(), torch.empty(numel, dtype=torch.bfloat16)
    count = torch.zeros(())

    def step() -> None:
        count.add_(1)
        torch._fused_adamw_(
            [weight], [grad.float()], [m], [v], [], [count], lr=1e-3, beta1=0.9, beta2=0.999,
            weight_decay=0.1, eps=1e-8, amsgrad=False, maximize=False,
        )  # fmt: skip
        out.copy_(weight)

    return step


def ours(numel: int, *, compiled: bool) -> Step:
    """Update with `FusedAdam`."""
    weight = torch.randn(numel)
    grad, out = torch.randn(numel).bfloat16(), torch.empty(numel, dtype=torch.bfloat16)
    optimizer = FusedAdam([weight], lr=1e-3, weight_decay=0.1)
    optimizer._large = compiled

    def step() -> None:
        optimizer.update_leaf(weight, optimizer.param_groups[0], grad, out=out, scale=torch.tensor(0.5))

    return step


def main() -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--numel", type=int, default=33_554_432)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = {"cast + fused + cast": naive(args.numel), "chunked": ours(args.numel, compiled=False)}
    if compiled_path.path_in_use()[0] == "compiled":
        rows["compiled"] = ours(args.numel, compiled=True)
    times: dict[str, list[float]] = {name: [] for name in rows}
    for round_ in range(args.rounds + 2):
        for name, step in rows.items():
            start = time.perf_counter()
            step()
            if round_ >= 2:
                times[name].append(time.perf_counter() - start)
    base = statistics.median(times["cast + fused + cast"])
    print(f"| {'update':20} | median ms |  min ms | ratio |")
    print(f"|{'-' * 22}|----------:|--------:|------:|")
    for name, spent in times.items():
        median = statistics.median(spent)
        print(f"| {name:20} | {median * 1e3:9.1f} | {min(spent) * 1e3:7.1f} | {median / base:5.2f} |")


if __name__ == "__main__":
    main()
