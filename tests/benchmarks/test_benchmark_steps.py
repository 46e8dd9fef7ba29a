"""What the benchmarks run: steps of several micro-batches, checkpointed blocks, a predicted construction."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from types import ModuleType

import pytest
import torch
from torch import Tensor

Load = Callable[[str], ModuleType]


def test_a_step_of_several_micro_batches_averages_their_gradients_and_updates_once(load: Load) -> None:
    model, rows, worker = load("model"), load("rows"), load("worker")
    shape = model.Shape(layers=1, dim=16, heads=2, seq=4, vocab=11, batch=2)
    drawn = model.batches(shape, 0, 4)

    class Recorder(rows.ComputeTrainer):  # type: ignore[name-defined, misc]
        updates = 0

        def update(self) -> None:
            self.updates += 1

    trainer = Recorder(model.build_model(shape), rows.Recipe(rows.Row("compute"), batch=2, accumulation=4))
    spans, loss = worker.run_step(trainer, drawn)
    whole = model.build_model(shape).bfloat16()
    expected = whole(torch.cat([ids for ids, _ in drawn]), torch.cat([targets for _, targets in drawn]))
    expected.backward()

    assert trainer.updates == 1
    assert loss == pytest.approx(expected.item(), rel=1e-2)
    torch.testing.assert_close(trainer.module.head.weight.grad, whole.head.weight.grad, atol=2e-3, rtol=5e-2)
    assert spans["total"] >= spans["forward"] + spans["backward"] + spans["step"] > 0


def test_checkpointed_blocks_change_no_gradient(load: Load) -> None:
    model = load("model")
    shape = model.Shape(layers=2, dim=16, heads=2, seq=4, vocab=11, batch=2)
    (batch,) = model.batches(shape, 0, 1)

    def gradients(checkpointing: bool) -> list[Tensor]:
        gpt = model.build_model(shape, checkpointing)
        gpt(*batch).backward()
        return [p.grad for p in gpt.parameters()]

    for with_it, without in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(with_it, without)


def test_the_options_of_a_comparison_stand_on_its_page(load: Load) -> None:
    page, options = load("comparison_page"), load("comparison_options")
    given = options.parse(
        [
            "--rows",
            "ours:3,ddp",
            "--ranks",
            "4",
            "--accumulation",
            "4",
            "--checkpointing",
            "--precision",
            "fp32",
        ]
    )

    subject, rows = page.Page(given).subject(), page.Page(given).rows()

    assert "ranks: 4" in subject
    assert "micro-batches of a step: 4" in subject
    assert "every block checkpointed" in subject
    assert "fp32, AdamW" in subject
    assert rows == "*DDP*: model and gradient reduction in fp32, fused AdamW."


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_one_rank_alone_makes_the_update_that_torch_makes_of_fp32_weights(load: Load, precision: str) -> None:
    model, rows, worker = load("model"), load("rows"), load("worker")
    shape = model.Shape(layers=1, dim=16, heads=2, seq=4, vocab=11, batch=2)
    drawn = model.batches(shape, 0, 2)
    twin = model.build_model(shape)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]

    recipe = rows.Recipe(rows.Row("alone"), batch=2, accumulation=2, precision=precision)
    trainer = rows.make_trainer(recipe, model.build_model(shape))
    worker.run_step(trainer, drawn)
    computing = model.build_model(shape).to(dtype)
    for batch in drawn:
        (computing(*batch) / 2).backward()
    for master, weight in zip(twin.parameters(), computing.parameters(), strict=True):
        master.grad = weight.grad.float()
    torch.nn.utils.clip_grad_norm_(twin.parameters(), rows.CLIP)
    rows.make_adamw(list(twin.parameters())).step()

    for weight, expected in zip(trainer.module.parameters(), twin.parameters(), strict=True):
        assert weight.dtype is dtype
        assert torch.equal(weight, expected.to(dtype))
    assert all(weight.grad is None for weight in trainer.module.parameters())


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_both_engines_are_told_the_precision(load: Load, precision: str) -> None:
    rows = load("rows")
    recipe = rows.Recipe(rows.Row("ours", 2), batch=2, accumulation=1, precision=precision)

    assert rows.engine_config(recipe, largest=0)["bf16"] == {"enabled": precision == "bf16"}


def test_work_survives_its_way_to_a_rank_and_into_the_results(load: Load) -> None:
    work, model = load("work"), load("model")
    some = work.Work(shape=model.Shape(layers=3), precision="fp32", ranks=4, accumulation=2)

    assert work.read_work(json.loads(json.dumps(asdict(some)))) == some
    assert some.tokens == 4 * 2 * some.shape.batch * some.shape.seq


def test_construction_is_predicted_from_the_layout_and_held_against_it(load: Load) -> None:
    model, construction = load("model"), load("construction")
    shape = model.Shape(layers=1, dim=16, heads=2, seq=4, vocab=100)
    prediction = construction.predict(shape, ranks=2)

    def run(*growths: float) -> list[dict[str, float]]:
        return [{"before": 5, "peak": 5 + growth * prediction.peak} for growth in growths]

    assert prediction.kept == model.count_parameters(shape)  # two bytes each, on two ranks
    assert prediction.making == 6 * 100 * 16
    assert construction.apart([run(1.0, 1.1), run(1.0, 1.2), run(2.0, 1.2)], prediction) == pytest.approx(0.2)
    assert 0.99e9 < model.count_parameters(construction.BILLION) < 1.01e9
