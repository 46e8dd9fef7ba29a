"""Measures everything this project is compared in, one setting after the other, and writes an overview.

    python benchmarks/suite.py                          # all: hours; makes the original's environment once
    python benchmarks/suite.py --quick                  # all with fewer rounds and steps
    python benchmarks/suite.py --only step_bf16,offload --pairs 9
    python benchmarks/suite.py --list
    python benchmarks/suite.py --index                  # only the overview, from the figures that are there

Started again after an interruption, it goes on where it stopped: what was measured on this machine with the same
sources stays, and is measured anew with --again, or if a row of it failed.
Results: NAME.json, NAME.md and NAME.png for each setting, and index.md, under benchmarks/results.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from arguments import some_of
from compare import Comparison, measure
from comparison_index import load, write_index
from comparison_options import PAIRS, QUICK_PAIRS, QUICK_STEPS, STEPS, Options, add_places
from comparison_table import Turn
from launch import HERE
from results import header
from suite_settings import NAMES, SETTINGS, SINGLES, Setting, Single

from deepspeed.common.commands import count

QUICK_NOTE = "A quick run: fewer rounds and steps."


def main() -> int:
    """Run what is asked for; 1 when something failed."""
    given = parse(sys.argv[1:])
    if given.list:
        print("\n".join(f"{each.name:16} {each.title}" for each in (*SETTINGS, *SINGLES)))
        return 0
    failed = [] if given.index else run(given)
    print(write_index(given.out).read_text())
    for name in failed:
        print(f"{name} failed", file=sys.stderr)
    return 1 if failed else 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", type=some_of(NAMES), default=NAMES, help="comma-separated, of --list")
    parser.add_argument("--list", action="store_true", help="name what there is to measure")
    parser.add_argument("--index", action="store_true", help="only write the overview")
    parser.add_argument("--pairs", type=count, help=f"rounds ({PAIRS}; quick: {QUICK_PAIRS})")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and steps")
    parser.add_argument("--again", action="store_true", help="measure anew what is there already")
    add_places(parser)
    given = parser.parse_args(arguments)
    if given.index and not given.out.is_dir():
        parser.error(f"--out: expected the folder of the results, got {given.out}")
    given.note = " ".join(filter(None, [QUICK_NOTE if given.quick else "", given.note]))
    return given


def run(given: argparse.Namespace) -> list[str]:
    """Measure one after the other, write the overview after each, and return the names of those that failed."""
    failed = []
    chosen = [each for each in (*SETTINGS, *SINGLES) if each.name in given.only]
    for number, each in enumerate(chosen, start=1):
        say(f"[{number}/{len(chosen)}] {each.name}: {each.title}")
        began = time.monotonic()
        try:
            outcome = compare(each, given) if isinstance(each, Setting) else run_script(each, given)
        except Exception as error:  # whatever stops one of them, the others are measured
            outcome = f"failed: {error!r}"
        if outcome.startswith("failed"):
            failed.append(each.name)
        say(f"[{number}/{len(chosen)}] {each.name}: {outcome} ({(time.monotonic() - began) / 60:.1f} min)")
        write_index(given.out)
    return failed


def compare(setting: Setting, given: argparse.Namespace) -> str:
    """Run the rounds of a setting that are missing; return what became of it."""
    comparison = resumed(setting.options(shared(given)), again=given.again)
    there = comparison.rounds
    if there >= comparison.options.pairs:
        return f"measured already, {comparison.head['date']}"
    if there:
        say(f"    goes on after round {there}")
    measure(comparison)
    if comparison.failures:
        return f"failed: {', '.join(comparison.failures)}"
    return "done"


def shared(given: argparse.Namespace) -> Options:
    """Return what all settings have in common."""
    return Options(
        pairs=given.pairs or (QUICK_PAIRS if given.quick else PAIRS),
        steps=QUICK_STEPS if given.quick else STEPS,
        swap=given.swap,
        original_python=given.original_python,
        note=given.note,
        out=given.out,
    )


def resumed(options: Options, *, again: bool) -> Comparison:
    """Take up a comparison after its last whole round, or begin it."""
    head, document = header(options.note), load(options.out, options.name)
    asked: dict[str, Any] = {"work": asdict(options.work), "rows": list(options.rows)}
    asked |= {"steps": options.steps, "warmup": options.warmup, "failures": {}}
    if again or not is_current(document, head) or {name: document.get(name) for name in asked} != asked:
        return Comparison(options, head)
    return Comparison(
        options,
        {name: document[name] for name in head},
        turns=[Turn(**turn) for turn in document["turns"]],
        versions=document["versions"],
    )


def is_current(document: dict[str, Any], head: dict[str, Any]) -> bool:
    """Tell whether a document's figures are of these sources, on this machine, as long as asked."""

    def identity(record: dict[str, Any]) -> list[Any]:
        box = {name: value for name, value in record["machine"].items() if name != "load_before"}
        return [record.get("source"), record["note"], box]

    return bool(document) and identity(document) == identity(head)


def run_script(single: Single, given: argparse.Namespace) -> str:
    """Run a benchmark's script; return what became of it."""
    before = load(given.out, single.name)
    if not given.again and is_current(before, header(given.note)):
        return f"measured already, {before['date']}"
    command = [sys.executable, str(HERE / single.script), *script_arguments(single, given)]
    done = subprocess.run(command, stdout=subprocess.DEVNULL)
    # What it wrote counts: some end with 1 when a goal is not met.
    if load(given.out, single.name) == before:
        return f"failed: exit code {done.returncode}"
    return "done"


def script_arguments(single: Single, given: argparse.Namespace) -> list[str]:
    """Say to a benchmark's script what was said to the suite."""
    arguments = ["--out", str(given.out), "--note", given.note]
    arguments += single.quick if given.quick else ()
    arguments += [single.rounds, str(given.pairs)] if given.pairs else []
    arguments += ["--folder", str(given.swap)] if single.swaps else []
    if single.beside_original and given.original_python:
        arguments += ["--original-python", str(given.original_python)]
    return arguments


def say(text: str) -> None:
    """Show progress."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
