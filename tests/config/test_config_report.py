"""The table of the effective configuration, and the page of all keys."""

import io
from pathlib import Path

from rich.console import Console

from deepspeed.config import DeepSpeedConfig, load_config
from deepspeed.config.reference import key_tables, with_tables
from deepspeed.config.report import render_config, rows
from deepspeed.config.tree import keys

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"
TREE = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": 4,
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "eps": 1e-6}},
    "zero_optimization": {
        "stage": 3,
        "stage3_max_live_parameters": 5,
        "reduce_bucket_size": "auto",
        "zero_quantized_weights": True,
    },
    "flops_profiler": {"profile_step": 2},
}


def table(tree, **options):
    return {row.path: row for row in rows(load_config(tree, refuse_unbuilt=False, **options))}


def test_each_value_says_where_it_came_from():
    found = table(TREE, world_size=2)
    assert (found["train_batch_size"].value, found["train_batch_size"].source) == (
        "8",
        "auto: from the other batch sizes",
    )
    assert found["gradient_accumulation_steps"].source == "from the other batch sizes"
    assert (found["optimizer.params.eps"].value, found["optimizer.params.eps"].source) == ("1e-06", "user")
    assert (found["optimizer.params.lr"].value, found["optimizer.params.lr"].source) == ('"auto"', "auto")
    assert (found["gradient_clipping"].value, found["gradient_clipping"].source) == ("1.0", "default")


def test_what_has_no_effect_or_is_refused_is_noted():
    found = table(TREE)
    assert found["zero_optimization.stage3_max_live_parameters"].note == ""
    assert found["zero_optimization.zero_quantized_weights"].note == "not built yet: quantised gathers"
    found = table({**TREE, "zero_optimization": {"stage": 2, "stage3_max_live_parameters": 5}})
    assert found["zero_optimization.stage3_max_live_parameters"].note == "no effect below stage 3"


def test_a_section_nobody_touched_is_one_row():
    found = table(TREE)
    assert found["autotuning"].note == "nothing given, off"
    assert found["flops_profiler.enabled"].source == "default"
    assert "fp16.hysteresis" in found


def test_a_secret_is_not_shown():
    assert table({"train_batch_size": 1, "comet": {"api_key": "abc"}})["comet.api_key"].value == "(hidden)"


def test_the_table_prints():
    out = io.StringIO()
    Console(file=out, width=200).print(render_config(load_config(TREE, world_size=2, refuse_unbuilt=False)))
    for word in ("data-parallel ranks: 2", "zero_optimization", "  stage", "not built yet", "nothing given"):
        assert word in out.getvalue()


def test_the_page_of_keys_is_in_step_with_the_sections():
    page = PAGE.read_text(encoding="utf-8")
    assert page == with_tables(page), "run: python -m deepspeed.config.reference docs/configuration.md"


def test_the_page_names_every_key():
    text = key_tables()
    for path, _ in keys(DeepSpeedConfig):
        assert f"`{path}`" in text or f"`{path.partition('.')[2]}`" in text, path
