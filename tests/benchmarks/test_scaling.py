"""A rank of many sends and keeps what the formulas of ZeRO say, and does no more for there being more ranks."""

from __future__ import annotations

import importlib
import multiprocessing
import sys
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = str(Path(__file__).resolve().parents[2] / "benchmarks")
RANKS = (8, 64, 512)
SIZES = {"layers": 2, "dim": 2048, "heads": 16, "kv_heads": 4, "hidden": 4096}


def simulate_and_rate(stage: int) -> tuple[list[dict[str, Any]], list[str]]:
    """Simulate on more and more ranks; return the entries of the results, and what grows."""
    sys.path.insert(0, BENCHMARKS)
    scaling, worker, llama = map(importlib.import_module, ("scaling", "scaling_worker", "llama"))
    worker.WARMUP, worker.STEPS = 0, 1  # nothing is timed here
    shape = llama.LlamaShape(**SIZES)
    # Nothing stays whole, so that the weights of stage 3 travel in forward and again in backward.
    zero = {"stage3_max_reuse_distance": 0, "stage3_param_persistence_threshold": 0}
    runs = [
        scaling.Run(
            "small",
            llama.count_parameters(shape),
            stage,
            ranks,
            worker.simulate(shape, ranks, stage, 16, zero),
        )
        for ranks in RANKS
    ]
    return [scaling.entry(run) for run in runs], [
        line for line in scaling.growing(runs) if "time" not in line
    ]


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Executor]:
    """A process of its own, as the simulated device takes a whole one."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        yield executor


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bytes_are_those_of_the_formulas_and_nothing_grows_with_the_ranks(
    elsewhere: Executor, stage: int
) -> None:
    entries, growing = elsewhere.submit(simulate_and_rate, stage).result()

    assert growing == []
    kept = [entry["kept"] for entry in entries]
    assert kept == sorted(kept, reverse=True)
    for entry in entries:
        sent = entry["sent"]
        if stage == 3:  # the backward of an embedding does not need the table
            table = 32000 * SIZES["dim"]
            sent += 2 * table * (entry["ranks"] - 1) / entry["ranks"]
        assert sent == pytest.approx(entry["sent_by_formula"], rel=2e-3)
        assert entry["kept"] == pytest.approx(entry["kept_by_formula"], rel=2e-3)
    calls = [{op: kind["calls"] for op, kind in entry["record"]["step"].items()} for entry in entries]
    assert calls[0] == calls[1] == calls[2]
    assert calls[0]["all_reduce"] == 1
    units = calls[0]["reduce_scatter_single"]
    assert calls[0]["all_gather_single"] == (2 * units - 1 if stage == 3 else units)
