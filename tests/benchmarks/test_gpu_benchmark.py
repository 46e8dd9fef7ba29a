"""What gpu.py counts, reads from a profile and holds against goals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

Load = Callable[[str], ModuleType]


def test_operations_are_those_that_torch_counts(load: Load) -> None:
    figures, model = load("gpu_figures"), load("model")
    shape = model.Shape(layers=2, dim=64, heads=2, seq=8, vocab=512, batch=2)
    with torch.device("meta"):
        gpt = model.GPT(shape)
        ids = torch.zeros(shape.batch, shape.seq, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        gpt(ids, ids).backward()

    expected = figures.flops_of_token(shape) * shape.batch * shape.seq
    assert expected == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_the_model_has_1_3_billion_parameters_that_multiply(load: Load) -> None:
    gpu, figures = load("gpu"), load("gpu_figures")

    assert figures.multiplied_weights(gpu.BILLION) == pytest.approx(1.3e9, rel=0.02)


def event(cat: str, name: str, ts: float, dur: float, **args: Any) -> dict[str, Any]:
    return {"cat": cat, "name": name, "ts": ts, "dur": dur, "args": args}


def test_a_profile_tells_pinned_copies_their_stream_what_hides_them_and_who_waits(load: Load) -> None:
    trace = load("gpu_trace")
    events = [
        event("user_annotation", "phase step", 0, 100),
        event("kernel", "adam", 0, 40, stream=7),
        event("kernel", "adam", 30, 30, stream=7),
        event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 50, 30, stream=20, bytes=2**20),
        event("gpu_memcpy", "Memcpy HtoD (Pageable -> Device)", 80, 10, stream=7, bytes=2**20),
        event("gpu_memcpy", "Memcpy DtoH (Device -> Pageable)", 90, 1, stream=7, bytes=4),
        event("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 0, 9, stream=7, bytes=2**20),
        event("cuda_runtime", "cudaStreamSynchronize", 95, 1),
        event("cpu_op", "aten::item", 94, 3),
        event("cuda_runtime", "cudaDeviceSynchronize", 200, 1),
        {"ph": "M", "name": "process_name"},
    ]

    use = trace.read_trace(events, steps=2)

    assert use.copied == 2**20
    assert (use.pinned, use.apart, use.hidden) == (30 / 40, 30 / 40, 10 / 40)
    assert use.waits == {"cudaStreamSynchronize": 0.5, "aten::item": 0.5}


def test_a_profile_without_a_device_has_no_shares(load: Load) -> None:
    use = load("gpu_trace").read_trace([event("cpu_op", "aten::mm", 0, 5)], steps=1)

    assert (use.copied, use.pinned, use.apart, use.hidden, use.waits) == (0, None, None, None, {})


@pytest.mark.parametrize("row", ["ddp", "ours:2:disk", "ours:4", "ours:2+quick", "compute"])
def test_a_row_that_is_no_engine_on_a_device_is_refused(load: Load, row: str) -> None:
    with pytest.raises(SystemExit):
        load("gpu").parse(["--rows", row])


def test_every_row_of_this_project_stands_beside_the_originals(load: Load) -> None:
    gpu = load("gpu")

    assert {row.replace("ours", "original") for row in gpu.ROWS[::2]} == set(gpu.ROWS[1::2])
    assert {f"ours:{stage}{how}" for stage in range(4) for how in ("", "+compile")} < set(gpu.ROWS)
    assert gpu.label_of("ours:2:host+compile") == "this project, stage 2, optimizer in host memory, compiled"
    bench = gpu.parse(["--pairs", "1"])
    assert bench.options.work.ranks == 1
    assert bench.writes == torch.accelerator.is_available()
    assert gpu.parse(["--out", "results"]).writes


def test_a_device_is_known_by_its_name(load: Load) -> None:
    peak = load("gpu_device").peak_flops

    assert peak("NVIDIA H200") == peak("NVIDIA H100 80GB HBM3") == 989e12
    assert peak("NVIDIA H100 PCIe") == 756e12
    assert peak("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak("cpu") is None


def test_figures_are_held_against_the_goals_of_a_gpu(load: Load) -> None:
    figures, table = load("gpu_figures"), load("comparison_table")
    seconds = {name: [0.1] for name in ("forward", "backward", "step", "total", "cpu")}
    record = {"seconds": seconds, "losses": [5.0, 4.0], "gathers": None, "disk": 0.0, "first_step": 1.0}
    record |= {"peak": 1, "peak_training": 1}
    turn = table.make_turn("ours:2+compile", 0, [record])
    rows = ("ours:2+compile", "ours:2:host", "original:2+compile", "original:2:host")
    turns = [replace(turn, row=row, total=0.2 if "original" in row else 0.1) for row in rows]
    compiled, offloaded, *_ = (
        figures.Figures(s, utilisation=0.45, device_peak=None, update_share=None, use=None)
        for s in table.summarise(turns, 10, str)
    )
    compiled = replace(compiled, use={"waits": {"aten::item": 2.0, "cudaStreamSynchronize": 1.0}})
    offloaded = replace(offloaded, use={"pinned": 1.0, "apart": 0.5, "waits": {}})
    update = figures.Update(numel=10**9, seconds=0.01, path="compiled", copy=4e12)

    found = figures.verdicts([compiled, offloaded], update, "NVIDIA H200")

    assert [(verdict.name, verdict.value, verdict.met) for verdict in found] == [
        ("x original", 2.0, True),
        ("MFU", 0.45, False),
        ("waits", 1.0, True),
        ("x original", 2.0, True),
        ("pinned", 1.0, True),
        ("apart", 0.5, False),
        ("of copy", 0.7, False),
    ]
    assert figures.verdicts([compiled], None, "NVIDIA A100")[1].name == "waits"
    text = figures.render([compiled, offloaded]) + figures.render_profile([replace(compiled, use=None)])
    assert "45%" in text
