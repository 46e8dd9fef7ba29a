"""Time one Adam step on 33.5M parameters: bf16 gradient in, bf16 weight out, one thread.

    python benchmarks/adam_step.py [--numel N] [--rounds R] [--threads T]

Rows run in turn, round by round: cast + torch's fused AdamW + cast (the base of the ratio), this project's
chunked pass, and its compiled pass where a compiler is present. A row's ratio is the median over rounds of
its time by the base's time in the same round, so a busy machine slows both sides of it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from deepspeed.ops.adam import FusedAdam, path_in_use

Step = Callable[[], None]
BASE = "cast + fused + cast"


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
    """Update with `FusedAdam`, which unscales and may skip as well."""
    weight = torch.randn(numel)
    grad, out = torch.randn(numel).bfloat16(), torch.empty(numel, dtype=torch.bfloat16)
    optimizer = FusedAdam([weight], lr=1e-3, weight_decay=0.1, compile=compiled)
    given = {"out": out, "scale": torch.tensor(0.5), "found_inf": torch.tensor(0.0)}

    def step() -> None:
        optimizer.update_leaf(weight, optimizer.param_groups[0], grad, **given)

    return step


def measure(rows: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each row in each round, after one round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(rounds + 1):
        for name, step in rows.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    print("first step: " + ", ".join(f"{name} {spent[0]:.2f} s" for name, spent in times.items()) + "\n")
    return {name: spent[1:] for name, spent in times.items()}


def main() -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--numel", type=int, default=33_554_432)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = {BASE: naive(args.numel), "chunked": ours(args.numel, compiled=False)}
    path, reason = path_in_use()
    print(f"on this machine: {path} ({reason})")
    if path == "compiled":
        rows["compiled"] = ours(args.numel, compiled=True)
    times = measure(rows, args.rounds)
    print(f"| {'update':20} | median ms |  min ms | ratio |")
    print(f"|{'-' * 22}|----------:|--------:|------:|")
    for name, spent in times.items():
        ratio = statistics.median(own / base for own, base in zip(spent, times[BASE], strict=True))
        median = statistics.median(spent)
        print(f"| {name:20} | {median * 1e3:9.1f} | {min(spent) * 1e3:7.1f} | {ratio:5.2f} |")


if __name__ == "__main__":
    main()
