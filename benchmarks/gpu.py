"""Trains a GPT of 1.3B parameters in bf16 on one GPU, this project and the original in turn, and writes the figures.

    python benchmarks/gpu.py                       # every row, 3 rounds; makes the original's environment once
    python benchmarks/gpu.py --profile             # and look at copies, streams and waits under the profiler
    python benchmarks/gpu.py --rows ours:2+compile,original:2+compile --batch 16 --name stage2
    python benchmarks/gpu.py --peak-tflops 121     # of a device that gpu_device.py does not know

Rows are those of rows.py that are engines: `ours:STAGE[:host]`, `original:STAGE[:host]`, with `+compile` behind for a
model compiled through the engine. Results: gpu.json and gpu.md under benchmarks/results.
Where there is no GPU a tiny model runs on the host through the same code, and files are written only with --out.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from subprocess import CalledProcessError
from typing import Any

import gpu_device
from arguments import file_name, positive
from compare import named_versions
from comparison_options import Options, add_places, add_work, chosen_work
from comparison_table import Turn, make_turn, summarise
from gpu_figures import (
    BYTES,
    COMPILED,
    Figures,
    Update,
    flops_of_token,
    is_offloaded,
    multiplied_weights,
    render,
    render_profile,
    verdicts,
)
from launch import HERE, Interpreter, RunFailed, interpreter_of, run_ranks
from model import Shape, count_parameters
from results import RESULTS, header, header_lines, write
from rows import label, split_row

from deepspeed.common.commands import count, count_or_none

BILLION = Shape(layers=24, dim=2048, heads=16, seq=2048, vocab=50304, batch=8)
TINY = Shape(layers=2, dim=64, heads=4, seq=32, vocab=256, batch=2)
ROWS = tuple(
    f"{kind}:{setting}"
    for setting in (
        *(f"{stage}{how}" for stage in range(4) for how in ("", COMPILED)),
        *(f"{stage}:host" for stage in (1, 2, 3)),
    )
    for kind in ("ours", "original")
)
UPDATE = "the fused update alone"
LEAF = {True: 2**20, False: 12 * BILLION.dim**2}
"""Elements of the leaf whose update is timed alone, on the host and on a GPU: there a block of the model."""


@dataclass
class Bench:
    """What is asked for, and what has been measured so far."""

    options: Options
    profile: bool
    peak: float | None
    writes: bool
    head: dict[str, Any]
    turns: list[Turn] = field(default_factory=list)
    records: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    updates: list[Update] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def device(self) -> str:
        """Name the device, as the ranks found it."""
        return next((records[0]["device"] for records in self.records.values()), gpu_device.kind())

    def figures(self) -> list[Figures]:
        """Summarise the rows."""
        work = self.options.work
        return [self._figures(s) for s in summarise(self.turns, work.tokens, label_of)]

    def _figures(self, s: Any) -> Figures:
        records, shape = self.records[s.row], self.options.work.shape
        peak = self.peak or gpu_device.peak_flops(self.device)
        peaks = [record["device_peak"] for record in records if record["device_peak"] is not None]
        copies = [update.copy for update in self.updates]
        updates_there = bool(copies) and not is_offloaded(s.row)
        moved = BYTES * count_parameters(shape) / s.phases["step"]
        return Figures(
            s,
            utilisation=None if peak is None else s.tokens_per_second * flops_of_token(shape) / peak,
            device_peak=median(peaks) if peaks else None,
            update_share=moved / median(copies) if updates_there else None,
            use=records[-1]["use"],
        )

    def update(self) -> Update | None:
        """Return the middle one of the updates that were timed alone."""
        ordered = sorted(self.updates, key=lambda one: one.share)
        return ordered[len(ordered) // 2] if ordered else None


def main() -> int:
    """Run the rounds; 1 when a row failed."""
    bench = parse(sys.argv[1:])
    text = ""
    for number in range(bench.options.pairs):
        for row in bench.options.rows:
            if row not in bench.failures:
                take_turn(bench, row, number)
        time_update(bench)
        # Written after each round, so that an interrupted run leaves what it has.
        text = report(bench)
    print(text)
    return 1 if bench.failures else 0


def parse(arguments: Sequence[str]) -> Bench:
    """Read the command line."""
    on_host = gpu_device.kind() == gpu_device.HOST
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=_rows, default=ROWS, help="comma-separated, in order")
    parser.add_argument("--pairs", type=count, default=3, help="rounds")
    parser.add_argument("--steps", type=count, default=10, help="timed steps a run")
    parser.add_argument("--warmup", type=count_or_none, default=4, help="steps before them")
    parser.add_argument("--profile", action="store_true", help="look at copies, streams and waits")
    parser.add_argument(
        "--peak-tflops", type=positive, help="dense bf16 peak of the device, in 1e12 a second"
    )
    parser.add_argument("--name", type=file_name, default="gpu", help="file name of the results")
    add_work(parser)
    add_places(parser)
    size = TINY if on_host else BILLION
    threads = 1 if on_host else os.cpu_count() or 1
    parser.set_defaults(**asdict(size), ranks=1, threads=threads, out=None)
    given = parser.parse_args(arguments)
    if given.ranks != 1:
        parser.error(f"--ranks: expected 1, got {given.ranks}; compare.py runs several, on the host")
    options = Options(
        work=chosen_work(parser, given),
        rows=given.rows,
        pairs=given.pairs,
        steps=given.steps,
        warmup=given.warmup,
        original_python=given.original_python,
        note=given.note,
        name=given.name,
        out=given.out or RESULTS,
    )
    peak = None if given.peak_tflops is None else given.peak_tflops * 1e12
    writes = given.out is not None or not on_host
    return Bench(options, given.profile, peak, writes, header(given.note))


def _rows(text: str) -> tuple[str, ...]:
    rows = tuple(dict.fromkeys(text.split(",")))
    for row in rows:
        if not _is_row(row):
            raise argparse.ArgumentTypeError(
                f"row: expected ours:STAGE[:host][{COMPILED}] or original:STAGE[:host][{COMPILED}], got {row!r}"
            )
    return rows


def _is_row(text: str) -> bool:
    try:
        row = split_row(text.removesuffix(COMPILED))
    except ValueError:
        return False
    return row.kind in ("ours", "original") and row.tier in ("", "host")


def label_of(row: str) -> str:
    """Name a row for the reader."""
    if row == UPDATE:
        return row
    plain = row.removesuffix(COMPILED)
    return label(plain) + (", compiled" if plain != row else "")


def take_turn(bench: Bench, row: str, number: int) -> None:
    """Run one row once and keep its figures, or the reason why there are none."""
    options, plain = bench.options, row.removesuffix(COMPILED)
    arguments = ["--row", plain, "--work", json.dumps(asdict(options.work))]
    arguments += ["--steps", str(options.steps), "--warmup", str(options.warmup)]
    arguments += ["--compile"] if plain != row else []
    arguments += ["--profile"] if bench.profile and number == options.pairs - 1 else []
    try:
        interpreter = on_device(interpreter_of(split_row(plain).kind, options.original_python))
        ranks = run_ranks(
            interpreter, HERE / "gpu_worker.py", arguments, ranks=1, threads=options.work.threads
        )
    except (RunFailed, CalledProcessError, OSError) as error:  # also of making the original's environment
        bench.failures[row] = str(error)
        print(f"round {number + 1}  {label_of(row):40} failed\n{error}", file=sys.stderr, flush=True)
        return
    turn = make_turn(row, number, ranks)
    bench.turns.append(turn)
    bench.records.setdefault(row, []).append(ranks[0])
    bench.versions |= named_versions(plain, ranks)
    print(
        f"round {number + 1}  {label_of(row):40} {turn.total * 1e3:8.1f} ms  loss {turn.last_loss:.4f}",
        file=sys.stderr,
        flush=True,
    )


def on_device(interpreter: Interpreter) -> Interpreter:
    """Let an interpreter use the device."""
    return replace(interpreter, variables={**interpreter.variables, "DS_ACCELERATOR": gpu_device.kind()})


def time_update(bench: Bench) -> None:
    """Time the fused update alone, and a copy."""
    leaf = LEAF[gpu_device.kind() == gpu_device.HOST]
    interpreter, threads = on_device(interpreter_of("ours", None)), bench.options.work.threads
    script, arguments = HERE / "gpu_update_worker.py", ["--numel", str(leaf)]
    try:
        (record,) = run_ranks(interpreter, script, arguments, ranks=1, threads=threads)
    except RunFailed as error:
        bench.failures[UPDATE] = str(error)
        return
    bench.updates.append(Update(**record))


def report(bench: Bench) -> str:
    """Return the page, and write it beside the figures as JSON where results are to be written."""
    figures, update = bench.figures(), bench.update()
    paragraphs = [
        "# Training on one device",
        subject(bench),
        *header_lines(bench.head, bench.versions),
        *([render(figures)] if figures else []),
        *([render_profile(figures)] if any(one.use for one in figures) else []),
        *notes(bench, update),
        goals(bench, figures, update),
        *(f"**{label_of(row)} failed:** {why.splitlines()[-1]}" for row, why in bench.failures.items()),
        METHOD.format(rounds=bench.options.pairs, warmup=bench.options.warmup, steps=bench.options.steps),
    ]
    document = {
        **bench.head,
        "device": bench.device,
        "versions": bench.versions,
        "work": asdict(bench.options.work),
        "rows": bench.options.rows,
        "figures": [asdict(one) for one in figures],
        "updates": [asdict(one) for one in bench.updates],
        "failures": bench.failures,
        "turns": [asdict(turn) for turn in bench.turns],
    }
    if bench.writes:
        write(bench.options.name, document, paragraphs, bench.options.out)
    return "\n\n".join(paragraphs)


METHOD = (
    "Rounds: {rounds}. In each, every row runs in a fresh process for {warmup} warm-up and {steps} timed "
    "steps, each from an idle device to an idle device; a run is the median of its steps, a row the median of "
    "its runs. *fwd*, *bwd*, *upd*: phases of further steps with the device idle between them. *MFU*: "
    "operations of the model (6 a multiplied weight and token, causal attention) by the device's dense bf16 "
    "peak. *peak GiB*: tensors on the device; *host GiB*: the process. *upd of copy*: bytes that a fused "
    "update has to move, by the time of the whole phase, norm and clipping included, by the bandwidth of a "
    "copy on the device. *x original*, *x without*: how many times as fast as the original and as the row "
    "without offload, medians of the ratios within a round. Of the profile, for a step: *pinned*, *apart*, "
    "*hidden* are shares of the time of copies between host and device, of pinned memory, on a stream other "
    "than that of most kernels, and while a kernel runs; waits and items are calls of the host."
)


def subject(bench: Bench) -> str:
    """Say what was trained, on what."""
    work, shape = bench.options.work, bench.options.work.shape
    return (
        f"GPT of {count_parameters(shape) / 1e6:,.1f}M parameters, {multiplied_weights(shape) / 1e6:,.1f}M of them "
        f"multiplied: {shape.layers} layers, width {shape.dim}, {shape.heads} heads, sequence {shape.seq}, vocabulary "
        f"{shape.vocab}, micro-batch {shape.batch}, micro-batches of a step: {work.accumulation}. {work.precision}, "
        f"AdamW, clipping 1.0, on one device: {bench.device}."
    )


def notes(bench: Bench, update: Update | None) -> list[str]:
    """Say what the table cannot."""
    found = []
    if bench.peak is None and gpu_device.peak_flops(bench.device) is None:
        found.append(f"No peak is known of {bench.device}, so there is no MFU; --peak-tflops gives one.")
    if update is not None:
        found.append(
            f"The fused update alone, {update.numel / 1e6:.1f}M elements, {update.path}: "
            f"{update.seconds * 1e3:.3f} ms, {update.bandwidth / 1e9:,.0f} GB/s; "
            f"a copy: {update.copy / 1e9:,.0f} GB/s; share: {update.share:.2f}."
        )
    return found


def goals(bench: Bench, figures: list[Figures], update: Update | None) -> str:
    """Hold the figures against the goals, which are those of a GPU."""
    if gpu_device.kind() == gpu_device.HOST:
        return "Goals are those of a GPU, and there is none."
    return "\n".join(verdict.line for verdict in verdicts(figures, update, bench.device))


if __name__ == "__main__":
    sys.exit(main())
