"""Damage is an error that names the file, on every rank; a save that ends early leaves the last checkpoint."""

from __future__ import annotations

import os
import random
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
import torch.distributed as dist
from checkpoint_runs import compare, everything, make_engine, train
from harness import run_on_ranks

from deepspeed.checkpoint.records import RecordWriter
from deepspeed.errors import CheckpointError, UsageError


def refusal(engine, folder, **options):
    with pytest.raises(CheckpointError) as caught:
        engine.load_checkpoint(folder, **options)
    texts = [None] * dist.get_world_size()
    dist.all_gather_object(texts, str(caught.value))
    assert all(texts)
    return str(caught.value)


def on_first(action):
    dist.barrier()
    if dist.get_rank() == 0:
        action()
    dist.barrier()


def flip(path, place):
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 0x10]))


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def damaged(folder, stage):
    engine = make_engine(stage, "bf16")
    train(engine, [0])
    engine.save_checkpoint(folder)
    train(engine, [1])
    engine.save_checkpoint(folder)
    whole = Path(folder) / "global_step2"
    names = sorted(path.name for path in whole.iterdir())
    assert len(names) == (5 if stage == 3 else 4)
    numbers = random.Random(stage)
    harms = [flip, flip, cut, Path.unlink] if stage == 3 else [flip]
    for name, harm in [(name, harm) for name in names for harm in harms]:
        path, kept = whole / name, Path(folder) / "kept"
        on_first(lambda p=path, k=kept: shutil.copy(p, k))
        place = (numbers.randrange(path.stat().st_size),) if harm is flip else ()
        on_first(lambda p=path, h=harm, a=place: h(p, *a))
        text = refusal(engine, folder)
        assert name in text, (name, text)
        assert 'newest whole checkpoint: tag="global_step1"' in text
        on_first(lambda p=path, k=kept: os.replace(k, p))
    path, _ = engine.load_checkpoint(folder)
    assert path == str(whole)
    on_first(lambda: flip(whole / names[-1], (whole / names[-1]).stat().st_size // 2))
    engine.settings.checkpoint.load_fallback = True
    path, _ = engine.load_checkpoint(folder)
    assert path == str(Path(folder) / "global_step1")
    assert engine.global_steps == 1
    engine.destroy()


@pytest.mark.parametrize("stage", [1, 3])
def test_a_flipped_byte_a_cut_or_missing_file_is_an_error_that_names_it_and_the_way_back(stage):
    with tempfile.TemporaryDirectory() as folder:
        run_on_ranks(2, damaged, folder, stage)


def latest(folder):
    engine = make_engine()
    assert engine.load_checkpoint(folder) == (None, None)
    assert engine.load_checkpoint(folder, tag="best") == (None, None)
    engine.settings.checkpoint.load_missing = "error"
    with pytest.raises(UsageError, match=r"there is no .*latest"):
        engine.load_checkpoint(folder)
    engine.save_checkpoint(folder, tag="first", save_latest=False)
    assert not (Path(folder) / "latest").exists()
    engine.save_checkpoint(folder, tag="second")
    path = Path(folder) / "latest"
    assert path.read_text() == "second"
    on_first(lambda: path.write_text(""))
    assert "latest: empty" in refusal(engine, folder)
    on_first(lambda: path.write_text("gone"))
    assert "names 'gone', which is not there" in refusal(engine, folder)
    assert "manifest.json: missing" in refusal(engine, folder, tag=".")
    engine.destroy()


def test_latest_may_be_missing_empty_or_wrong():
    with tempfile.TemporaryDirectory() as folder:
        run_on_ranks(2, latest, folder)


def other_tags(folder):
    engine = make_engine()
    rank = dist.get_rank()
    engine.save_checkpoint(folder, tag=f"rank{rank}")
    assert (Path(folder) / "rank0").is_dir()
    assert not (Path(folder) / "rank1").exists()
    engine.settings.checkpoint.tag_validation = "fail"
    with pytest.raises(UsageError, match=r"'rank0' and on rank 1 'rank1'.*tag_validation"):
        engine.save_checkpoint(folder, tag=f"rank{rank}")
    engine.destroy()


def test_ranks_that_disagree_on_the_tag_use_the_first_one_s_or_fail():
    with tempfile.TemporaryDirectory() as folder:
        run_on_ranks(2, other_tags, folder)


def full_disk(folder):
    engine = make_engine(3)
    train(engine, [0])
    engine.save_checkpoint(folder)
    before = everything(engine)
    append = RecordWriter.append

    def full(self, room, values, **kind):
        if dist.get_rank() == 1 and room.index == 3:
            raise OSError(28, "No space left on device")
        append(self, room, values, **kind)

    RecordWriter.append = full
    try:
        train(engine, [1])
        with pytest.raises(CheckpointError, match="No space left"):
            engine.save_checkpoint(folder)
    finally:
        RecordWriter.append = append
    dist.barrier()
    assert sorted(os.listdir(folder)) == ["global_step1", "latest", "zero_to_fp32.py"]
    engine.load_checkpoint(folder)
    compare(everything(engine), before)
    engine.save_checkpoint(folder)
    engine.destroy()


def test_a_full_disk_on_one_rank_is_an_error_on_all_and_leaves_the_last_checkpoint():
    with tempfile.TemporaryDirectory() as folder:
        run_on_ranks(2, full_disk, folder)


class Killed:
    """Kill this process at its n-th call that changes the disk."""

    CALLS = ("pwrite", "pwritev", "rename", "replace", "fsync", "mkdir", "open", "rmdir", "unlink")

    def __init__(self, after):
        self.left = after
        self.originals = {name: getattr(os, name) for name in self.CALLS}

    def install(self):
        for name, original in self.originals.items():
            setattr(os, name, self.counting(original))

    def counting(self, original):
        def call(*args, **kwargs):
            self.left -= 1
            if self.left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return call


def killed(folder, tag):
    """Save in children that are killed after more and more calls; after each, the newest whole state loads."""
    engine = make_engine(2)
    train(engine, [0])
    engine.save_checkpoint(folder, tag=tag)
    train(engine, [1])
    after, ended = 0, False
    while not ended:
        child = os.fork()
        if child == 0:
            Killed(after).install()
            engine.save_checkpoint(folder, tag=tag)
            os._exit(0)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        steps = engine.global_steps
        path, _ = engine.load_checkpoint(folder, load_module_only=True)
        assert path is not None
        engine.global_steps = steps
        after += 5 if tag is None else 7
    assert after > 60
    engine.load_checkpoint(folder)
    assert engine.global_steps == 2
    engine.destroy()


@pytest.mark.parametrize("tag", [None, "same"])
def test_a_job_killed_at_any_moment_of_a_save_leaves_a_whole_checkpoint(tag):
    with tempfile.TemporaryDirectory() as folder:
        run_on_ranks(1, killed, folder, tag)
