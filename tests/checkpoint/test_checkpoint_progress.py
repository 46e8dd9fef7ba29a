"""Saves and loads that take long show a bar on the first rank's terminal, and nothing otherwise."""

from __future__ import annotations

import tempfile
from io import StringIO
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from checkpoint_runs import make_engine, train
from harness import run_on_ranks
from rich.console import Console

from deepspeed.checkpoint.manifest import Manifest
from deepspeed.common.progress import ByteBar
from deepspeed.config.checkpoint import CheckpointWriterSection
from deepspeed.engine import checkpointing
from deepspeed.errors import UsageError


class Screens:
    """Stands for the bars of the engine: each has a terminal of its own, and no patience."""

    def __init__(self):
        self.bars = []

    def __call__(self, what, total=0, *, shown):
        screen = StringIO()
        console = Console(file=screen, force_terminal=True, width=200)
        bar = ByteBar(what, total, shown=shown, console=console, patience=0)
        self.bars.append((bar, screen))
        return bar


def bars(folder, stage):
    engine = make_engine(stage, "bf16")
    train(engine, [0])
    checkpointing.ByteBar = screens = Screens()
    try:
        engine.save_checkpoint(folder)
        engine.load_checkpoint(folder)
    finally:
        checkpointing.ByteBar = ByteBar
    for (bar, screen), what in zip(screens.bars, ("saving", "loading"), strict=True):
        assert bar.done > 0
        drawn = screen.getvalue()
        if dist.get_rank() == 0:
            assert f"{what} {folder}/global_step1" in drawn
            assert "kB" in drawn
            assert drawn.endswith("\x1b[1A\x1b[2K")
        else:
            assert drawn == ""
    engine.destroy()


@pytest.mark.parametrize("stage", [0, 3])
def test_a_bar_is_on_the_first_rank_only_and_goes_when_it_is_done(stage):
    with tempfile.TemporaryDirectory() as folder:
        run_on_ranks(2, bars, folder, stage)


def bytes_read(folder, saved, loaded):
    engine = make_engine(saved, "bf16")
    train(engine, [0])
    engine.save_checkpoint(folder)
    engine = make_engine(loaded, "bf16")
    checkpointing.ByteBar = screens = Screens()
    try:
        engine.load_checkpoint(folder)
    finally:
        checkpointing.ByteBar = ByteBar
    (bar, _), read = screens.bars[0], [torch.tensor(0), torch.tensor(0)]
    dist.all_gather(read, torch.tensor(bar.done))
    manifest = Manifest.read(Path(folder) / "global_step1")
    assert sum(read) == sum(record.nbytes for entry in manifest.files for record in entry.records)
    weights = sum(value.numel() for value in engine.module.state_dict().values()) * 2
    assert abs(read[0] - read[1]) < weights / 2, read
    engine.destroy()


@pytest.mark.parametrize(("saved", "loaded"), [(1, 2), (2, 2)])
def test_ranks_together_read_every_byte_once_and_share_what_nobody_needs(saved, loaded):
    with tempfile.TemporaryDirectory() as folder:
        run_on_ranks(2, bytes_read, folder, saved, loaded)


def bar_of_a_failed_save(folder):
    engine = make_engine(2)
    train(engine, [0])
    checkpointing.ByteBar = screens = Screens()
    try:
        with pytest.raises(UsageError):
            engine.save_checkpoint(folder, client_state={"module": 1})
    finally:
        checkpointing.ByteBar = ByteBar
    ((_, screen),) = screens.bars
    assert screen.getvalue() == ""
    engine.destroy()


def test_a_save_that_is_refused_at_once_shows_no_bar():
    with tempfile.TemporaryDirectory() as folder:
        run_on_ranks(1, bar_of_a_failed_save, folder)


def background(folder):
    engine = make_engine(2)
    engine.settings.checkpoint.writer = CheckpointWriterSection(decoupled=True)
    train(engine, [0])
    checkpointing.ByteBar = screens = Screens()
    try:
        engine.save_checkpoint(folder)
        engine.finish_saving()
    finally:
        checkpointing.ByteBar = ByteBar
    ((bar, screen),) = screens.bars
    assert bar.done > 0
    assert screen.getvalue() == ""
    engine.destroy()


def test_a_save_in_the_background_shows_no_bar():
    with tempfile.TemporaryDirectory() as folder:
        run_on_ranks(1, background, folder)
