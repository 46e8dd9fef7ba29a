"""A checkpoint that is written while training goes on is that of the moment it was asked for; old ones go."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from checkpoint_runs import compare, everything, make_engine, train
from harness import free_port, run_on_ranks

from deepspeed.checkpoint.records import RecordWriter, Room
from deepspeed.config import load_config
from deepspeed.errors import CheckpointError, ConfigError
from deepspeed.offload.disk import Disk

LATER = {"writer": {"type": "FAST", "decoupled": True}}


def moment(stage, tier):
    with tempfile.TemporaryDirectory() as own:
        folders = [own]
        dist.broadcast_object_list(folders)
        folder = folders[0]
        swap = tempfile.mkdtemp(dir=own) if tier else None
        make = {"precision": "bf16", "tier": swap, "params": tier == "all"}
        engine = make_engine(stage, checkpoint=LATER, **make)
        train(engine, [0, 1])
        at_the_save = everything(engine)
        engine.save_checkpoint(folder, client_state={"epoch": 2})
        train(engine, [2, 3])
        engine.save_checkpoint(folder)
        train(engine, [4])
        engine.finish_saving()
        assert (Path(folder) / "latest").read_text() == "global_step4"

        other = make_engine(stage, seed=1, **make)
        _, client = other.load_checkpoint(folder, tag="global_step2")
        assert (client, other.global_steps) == ({"epoch": 2}, 2)
        compare(everything(other), at_the_save)
        train(other, [2, 3, 4])
        compare(everything(other), everything(engine))
        dist.barrier()
        for one in (engine, other):
            one.destroy()
        dist.barrier()


@pytest.mark.parametrize(
    ("stage", "tier"), [(0, None), (1, None), (2, None), (3, None), (2, "states"), (3, "all")]
)
def test_a_save_in_the_background_is_that_of_its_moment(stage, tier):
    run_on_ranks(2, moment, stage, tier)


def forgets_a_save(folder):
    engine = make_engine(2, checkpoint=LATER)
    train(engine, [0])
    engine.save_checkpoint(folder)
    save = weakref.ref(engine._saving)
    train(engine, [1])
    engine.finish_saving()
    gc.collect()
    assert save() is None
    engine.destroy()


def test_a_save_that_has_ended_is_forgotten_with_the_values_it_holds(tmp_path):
    run_on_ranks(1, forgets_a_save, tmp_path)


def test_steady_values_are_those_of_the_moment_however_far_the_thread_is(tmp_path):
    for ahead in (0, 1, 3, 8):  # how many values the thread has written when they are to change
        rooms = [Room((1000,), torch.float32) for _ in range(8)]
        path, disk = tmp_path / f"{ahead}.pt", Disk()
        writer = RecordWriter(path, {"values": rooms}, disk, later=True)
        values = [torch.full((1000,), float(number)) for number in range(8)]
        for room, value in zip(rooms, values, strict=True):
            writer.append(room, value[:400], steady=True)
            writer.append(room, value[400:], steady=True)
        write, written, go_on = writer._write, [], threading.Event()

        def slowly(room, part, write=write, written=written, ahead=ahead, go_on=go_on):
            write(room, part)
            written.append(part)
            if len(written) == ahead:
                go_on.set()
                time.sleep(0.05)

        writer._write = slowly
        thread = threading.Thread(target=writer.close)
        if ahead:
            thread.start()
            go_on.wait()
        writer.secure()
        for value in values:
            value.fill_(-1)
        if not ahead:
            thread.start()
        thread.join()
        disk.close()
        saved = torch.load(path, weights_only=True)["values"]
        assert [value.unique().tolist() for value in saved] == [[float(number)] for number in range(8)]


def failing(folder):
    engine = make_engine(3, checkpoint=LATER)
    train(engine, [0])
    engine.save_checkpoint(folder)
    engine.finish_saving()
    before = everything(engine)
    close = RecordWriter.close

    def full(self):
        if dist.get_rank() == 1:
            raise CheckpointError("No space left on device")
        return close(self)

    RecordWriter.close = full
    try:
        train(engine, [1])
        engine.save_checkpoint(folder)
        train(engine, [2])  # goes on
        with pytest.raises(CheckpointError, match=r"global_step2: .*No space left"):
            engine.save_checkpoint(folder)
    finally:
        RecordWriter.close = close
    assert "global_step2" not in os.listdir(folder)
    engine.load_checkpoint(folder)
    compare(everything(engine), before)
    engine.save_checkpoint(folder, tag="again")
    engine.destroy()
    assert (Path(folder) / "latest").read_text() == "again"


def test_a_failure_in_the_background_is_an_error_of_the_next_call_on_all_ranks():
    with tempfile.TemporaryDirectory() as folder:
        run_on_ranks(2, failing, folder)


SCRIPT = """
import sys
import torch
import torch.distributed as dist
import deepspeed

config = {{
    "train_micro_batch_size_per_gpu": 1,
    "optimizer": {{"type": "AdamW", "params": {{"lr": 0.1}}}},
    "checkpoint": {{"writer": {{"decoupled": True}}}},
}}
engine, *_ = deepspeed.initialize(model=torch.nn.Linear(1500, 1500), config=config)
engine.backward(engine(torch.ones(1, 1500)).sum())
engine.step()
engine.save_checkpoint({folder!r})
{end}
"""


def run_script(script):
    """Run a script as the only rank of a job of its own."""
    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **place, "MASTER_PORT": str(free_port())},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("end", ["dist.destroy_process_group()", "", "del engine", "raise SystemExit(3)"])
def test_the_end_of_a_script_waits_for_its_last_save(end, tmp_path):
    ended = run_script(textwrap.dedent(SCRIPT).format(folder=str(tmp_path), end=end))
    assert ended.returncode == (3 if "Exit" in end else 0), ended.stderr
    assert sorted(os.listdir(tmp_path)) == ["global_step1", "latest", "zero_to_fp32.py"]


def keeping(folder):
    engine = make_engine(1, checkpoint={"keep_last": 2})
    for step in range(4):
        train(engine, [step])
        engine.save_checkpoint(folder)
        if step == 1:
            engine.save_checkpoint(folder, tag="best", save_latest=False)
    dist.barrier()
    assert sorted(os.listdir(folder)) == ["best", "global_step3", "global_step4", "latest", "zero_to_fp32.py"]
    engine.load_checkpoint(folder, tag="global_step3")
    engine.save_checkpoint(folder)  # replaces one, and is not one too many
    engine.load_checkpoint(folder, tag="best")
    train(engine, [2])
    engine.save_checkpoint(folder, tag="other", save_latest=False)
    dist.barrier()
    assert sorted(os.listdir(folder)) == [
        "best",
        "global_step3",
        "global_step4",
        "latest",
        "other",
        "zero_to_fp32.py",
    ]
    engine.destroy()


def test_as_many_checkpoints_as_asked_for_stay_beside_those_with_tags_of_their_own():
    with tempfile.TemporaryDirectory() as folder:
        run_on_ranks(2, keeping, folder)


def test_a_writer_that_would_save_nothing_is_refused():
    config = {"train_batch_size": 1, "checkpoint": {"writer": {"type": "MOCK"}}}
    with pytest.raises(ConfigError, match=r"checkpoint.writer.type: .*MOCK"):
        load_config(config)
