"""Time one Adam step on 33.5M parameters: bf16 gradient in, bf16 weight out, one thread.

    python benchmarks/adam_step.py [--numel N] [--rounds R] [--threads T]

Rows run in turn, round by round: cast + torch's fused AdamW + cast (the base of the ratio), this project's
chunked pass, and its compiled pass where a compiler is present. A row's ratio is the median over rounds of
its time by the base's time in the same round, so a busy machine slows both sides of it.
Results: adam_step.json and adam_step.md under benchmarks/results.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from arguments import add_results
from results import header, header_lines, markdown_table, write

from deepspeed.common.commands import count
from deepspeed.ops.adam import FusedAdam, path_in_use

Step = Callable[[], None]
BASE = "cast + torch's fused AdamW + cast"
GOAL = 0.6


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
    return {name: spent[1:] for name, spent in times.items()}


def main() -> None:
    """Measure, print and write."""
    options = parse(sys.argv[1:])
    head = header(options.note)
    torch.set_num_threads(options.threads)
    rows = {BASE: naive(options.numel), "this project, chunked": ours(options.numel, compiled=False)}
    path, reason = path_in_use()
    if path == "compiled":
        rows["this project, compiled"] = ours(options.numel, compiled=True)
    times = measure(rows, options.rounds)
    print(report(times, f"Without choice, large models use the {path} pass here: {reason}.", head, options))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--numel", type=count, default=33_554_432)
    parser.add_argument("--rounds", type=count, default=15)
    parser.add_argument("--threads", type=count, default=1)
    add_results(parser)
    return parser.parse_args(arguments)


def report(
    times: dict[str, list[float]], path: str, head: dict[str, Any], options: argparse.Namespace
) -> str:
    """Write JSON and Markdown; return the page."""
    ratios = {
        name: statistics.median(own / base for own, base in zip(spent, times[BASE], strict=True))
        for name, spent in times.items()
    }
    cells = [
        [name, f"{statistics.median(spent) * 1e3:.1f}", f"{min(spent) * 1e3:.1f}", f"{ratios[name]:.2f}"]
        for name, spent in times.items()
    ]
    verdicts = [
        f"- {name}: {ratio:.2f} of the base's time (goal: at most {GOAL}, {'met' if ratio <= GOAL else 'NOT met'})."
        for name, ratio in ratios.items()
        if name != BASE
    ]
    versions = {"torch": str(torch.__version__)}
    paragraphs = [
        f"# Adam on {options.numel / 1e6:.1f} million parameters",
        f"bf16 gradient in, bf16 weight out, fp32 master and moments; rounds: {options.rounds}, "
        f"threads: {options.threads}.",
        *header_lines(head, versions),
        markdown_table(["update", "median ms", "min ms", "ratio"], cells),
        "\n".join(verdicts),
        path,
    ]
    document = {**head, "versions": versions, "numel": options.numel, "seconds": times, "verdicts": verdicts}
    return write("adam_step", document, paragraphs, options.out).read_text()


if __name__ == "__main__":
    main()
