"""engine.compile() at stage 3: blocks are compiled, gathering stays outside, results are the same."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch._dynamo
from harness import run_on_ranks
from torch._dynamo.utils import counters
from training import STEPS, assert_equal_training, config_for, drive_engine, train_both


def compiled_parity(model, backend):
    torch._dynamo.reset()
    counters.clear()
    warnings.filterwarnings(
        "ignore", "The .grad attribute"
    )  # torch hides its own, but not where they are errors
    graphs = []

    def drive(engine, batches):
        if not engine.is_compiled:
            engine.compile(backend=backend)
        losses = drive_engine(engine, batches)
        graphs.append(counters["stats"]["unique_graphs"])
        return losses

    engine, plain = train_both(config_for(3, "fp32", 2, 0.5), model=model, drive=drive)
    assert_equal_training(engine, plain, 2e-6)
    assert len(graphs) == STEPS
    assert graphs[0] > 0
    assert len(set(graphs[1:])) == 1, "compiled again after the second step"
    assert not counters["graph_break"]
    engine.destroy()
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "model",
    [{}, {"frozen": True, "tied": True}, {"checkpointing": "non_reentrant"}],
    ids=lambda model: "+".join(model) or "plain",
)
def test_compiled_blocks_train_the_same(model):
    run_on_ranks(2, compiled_parity, model, "aot_eager")
