"""Every way to compile: results are those of plain PyTorch, and blocks that are alike share a graph at stage 3."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import warnings
from contextlib import contextmanager

import pytest
import torch
import torch._dynamo
from harness import run_on_ranks
from torch._dynamo.utils import counters
from toys import make_toy, toy_batch, toy_loss
from training import STEPS, assert_equal_training, config_for, train_both

import deepspeed
from deepspeed.zero import GatheredParameters
from deepspeed.zero.released import ZeroParamStatus

BACKEND = "aot_eager"
DEEP = 12
"""More blocks than torch compiles one function for anew, before it gives up."""


def whole_model(toy):
    return torch.compile(toy, backend=BACKEND)


def in_place(toy):
    toy.compile(backend=BACKEND)
    return toy


def each_block(toy):
    for block in toy.blocks:
        block.compile(backend=BACKEND)
    return toy


def engine_itself(engine):
    engine.compile(backend=BACKEND)
    return engine


def around_the_engine(engine):
    return torch.compile(engine, backend=BACKEND)


def around_its_module(engine):
    return torch.compile(engine.module, backend=BACKEND)


def its_module_in_place(engine):
    in_place(engine.module)
    return engine


def each_of_its_blocks(engine):
    each_block(engine.module)
    return engine


BEFORE = {"torch.compile(model)": whole_model, "model.compile()": in_place, "block.compile()": each_block}
AFTER = {
    "engine.compile()": engine_itself,
    "torch.compile(engine)": around_the_engine,
    "torch.compile(engine.module)": around_its_module,
    "engine.module.compile()": its_module_in_place,
    "engine.module.block.compile()": each_of_its_blocks,
}


def backward_and_step(engine, loss):
    engine.backward(loss)
    engine.step()


def plain_backward_and_step(engine, loss):
    loss.backward()
    engine.step()


def look(model, batch):
    """Run the model where gradients are off, which torch compiles anew."""
    model.eval()
    with torch.no_grad():
        toy_loss(model, batch)
    model.train()


@contextmanager
def nothing_unraisable():
    """Fail if Python meets an error that it can only print, in ``__del__`` say."""
    met = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "unraisablehook", met.append)
        yield
        gc.collect()
    assert not met


@nothing_unraisable()
def compiled_parity(stage, way, model, gas, update, *, looks_between=False, loss_of=toy_loss):
    torch._dynamo.reset()
    counters.clear()
    # torch hides its own, but not where they are errors
    warnings.filterwarnings("ignore", "The .grad attribute")
    compiled, graphs = [], []

    def drive(engine, batches):
        if not compiled:
            compiled.append(AFTER[way](engine) if way in AFTER else engine)
        losses = []
        for batch in batches:
            losses.append(loss_of(compiled[0], batch))
            update(engine, losses[-1])
            if looks_between:
                look(compiled[0], batch)
        graphs.append(counters["stats"]["unique_graphs"])
        return [loss.detach() for loss in losses]

    config = config_for(stage, "fp32", gas, 0.5)
    engine, plain = train_both(config, model=model, drive=drive, prepare=BEFORE.get(way), loss_of=loss_of)
    assert_equal_training(engine, plain, 2e-6)
    assert len(graphs) == STEPS
    assert graphs[0] > 0
    assert len(set(graphs[1:])) == 1, "compiled again after the second step"
    engine.destroy()
    torch._dynamo.reset()
    return graphs[-1]


@pytest.mark.parametrize(
    ("way", "model"),
    [
        *((way, {}) for way in BEFORE),
        *(
            (way, model)
            for way in AFTER
            for model in ({"frozen": True, "tied": True}, {"checkpointing": "non_reentrant"})
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(value) or "plain",
)
def test_compiled_blocks_train_the_same(way, model):
    run_on_ranks(2, compiled_parity, 3, way, model, 2, backward_and_step)


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("way", [*AFTER, *BEFORE])
def test_compiled_blocks_train_the_same_on_any_number_of_ranks(way, ranks):
    run_on_ranks(ranks, compiled_parity, 3, way, {}, 2, backward_and_step)


def reaching_parity(way):
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        compiled_parity(3, way, {"reaching": True}, 2, backward_and_step, looks_between=True)


@pytest.mark.parametrize("way", [*AFTER, *BEFORE])
def test_a_model_that_reaches_into_its_blocks_is_compiled_a_few_times_only(way):
    run_on_ranks(2, reaching_parity, way)


def loss_with_parts_by_themselves(model, batch):
    toy = getattr(model, "module", model)
    hidden = toy.blocks[0][1](toy.embed(batch[0]))
    return toy_loss(model, batch) + hidden.square().mean()


def parts_parity(way):
    compiled_parity(3, way, {"tied": True}, 2, backward_and_step, loss_of=loss_with_parts_by_themselves)


@pytest.mark.parametrize("way", [*AFTER, *BEFORE])
def test_parts_of_a_compiled_model_train_by_themselves(way):
    run_on_ranks(2, parts_parity, way)


class Turned(torch.nn.Linear):
    """A layer that computes with a view of its weight."""

    def forward(self, hidden):
        return hidden @ self.weight.t()


def views_of_parts():
    net = torch.nn.Sequential(torch.nn.Sequential(Turned(4, 4), torch.nn.GELU(), torch.nn.Linear(4, 2)))
    config = config_for(3, "fp32", 1, 0)
    engine, *_ = deepspeed.initialize(model=net, config=config)
    engine.compile(backend=BACKEND)
    layer = engine.module[0][0]
    with GatheredParameters(layer.weight):
        weight = layer.weight.detach().clone()
    hidden = torch.arange(8.0).view(2, 4)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert torch.equal(layer(hidden), hidden @ weight.t())
    assert layer.weight.ds_status is ZeroParamStatus.NOT_AVAILABLE
    engine.destroy()


def test_a_part_of_a_compiled_model_may_compute_with_views_of_its_weights():
    run_on_ranks(2, views_of_parts)


def copies_compute_by_themselves(make_copy):
    engine, *_ = deepspeed.initialize(model=make_toy(), config=config_for(3, "fp32", 1, 0))
    engine.compile(backend=BACKEND)
    batch = toy_batch(0, 0, 0)
    backward_and_step(engine, toy_loss(engine, batch))
    with GatheredParameters(list(engine.module.parameters())):
        copied = make_copy(engine.module)
    with torch.no_grad():
        assert torch.equal(toy_loss(copied, batch), toy_loss(engine, batch))
        for param in copied.parameters():
            param.zero_()
        assert not copied(batch[0]).any()
    engine.destroy()


def pickled(module):
    return pickle.loads(pickle.dumps(module))


@pytest.mark.parametrize("make_copy", [copy.deepcopy, pickled])
def test_a_copy_of_a_compiled_model_computes_with_its_own_weights(make_copy):
    run_on_ranks(2, copies_compute_by_themselves, make_copy)


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("way", [*AFTER, *BEFORE])
def test_a_plain_backward_through_a_compiled_model_is_reduced(way, stage):
    run_on_ranks(2, compiled_parity, stage, way, {}, 1, plain_backward_and_step)


def graphs_of_alike_blocks(way):
    few, many = (compiled_parity(3, way, {"depth": depth}, 1, backward_and_step) for depth in (2, DEEP))
    assert many == few


@pytest.mark.parametrize("way", [*AFTER, *BEFORE])
def test_blocks_that_are_alike_share_a_graph(way):
    run_on_ranks(2, graphs_of_alike_blocks, way)


def nothing_breaks_graphs():
    compiled_parity(3, "engine.compile()", {}, 2, backward_and_step)
    assert not counters["graph_break"]


def test_blocks_compiled_by_the_engine_are_whole_graphs():
    run_on_ranks(2, nothing_breaks_graphs)
