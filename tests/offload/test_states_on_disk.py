"""States on disk are read and set like those in memory, give memory back, and fail on every rank or on none."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import tempfile
import threading
import weakref
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harness import run_on_ranks
from places import host_apart
from torch import nn
from toys import make_toy, toy_batch
from training import config_for, drive_engine

import deepspeed
from deepspeed.errors import OffloadError, UsageError
from deepspeed.offload.files import DataFile
from deepspeed.offload.swap import SwapFolder
from deepspeed.offload.tier import DiskTier
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_set_full_fp32_param,
    safe_set_full_grad,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
)
from deepspeed.zero.states import LeafStates


def make_engine_on_host(stage):
    with host_apart():
        config = config_for(stage, "bf16", 1, 0.5, offload_optimizer={"device": "cpu"})
        return deepspeed.initialize(model=make_toy(), config=config)[0]


def make_engine(folder, stage=3, precision="bf16", optimizer=None, gas=1, model=None, **zero):
    states = {"device": "nvme", "nvme_path": folder} if folder else {"device": "none"}
    config = config_for(
        stage, precision, gas, 0.5, **{"offload_optimizer": states, "sub_group_size": 16, **zero}
    )
    if optimizer is not None:
        del config["optimizer"]
    return deepspeed.initialize(model=model or make_toy(), config=config, optimizer=optimizer)[0]


def train(engine, steps, gas=1):
    for step in steps:
        drive_engine(engine, [toy_batch(step, micro, dist.get_rank()) for micro in range(gas)])


@contextmanager
def a_folder():
    with tempfile.TemporaryDirectory() as folder:
        yield folder
        assert not list(Path(folder).iterdir())


def same(first, second):
    """Equal but for the last bit: an update may round differently where a leaf is cut."""
    for one, other in zip(first.module.parameters(), second.module.parameters(), strict=True):
        close(safe_get_full_fp32_param(one), safe_get_full_fp32_param(other))
        for key in ("exp_avg", "exp_avg_sq") if one.numel() else ():
            close(safe_get_full_optimizer_state(one, key), safe_get_full_optimizer_state(other, key))


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def edits(folder, stage):
    away = make_engine(folder, stage) if folder else make_engine_on_host(stage)
    here = make_engine(None, stage)
    for engine in (away, here):
        train(engine, [0])
        engine.backward(engine(toy_batch(1, 0, dist.get_rank())[0]).float().square().mean())
        weight = engine.module.embed.weight
        safe_set_full_grad(weight, safe_get_full_grad(weight) * 2)
        engine.step()
        safe_set_full_fp32_param(weight, safe_get_full_fp32_param(weight) + 1)
        safe_set_full_optimizer_state(weight, safe_get_full_optimizer_state(weight, "exp_avg") / 2, "exp_avg")
        local = safe_get_local_fp32_param(weight)
        safe_set_local_fp32_param(weight, torch.empty(0) if local is None else local * 1.5)
        with deepspeed.zero.GatheredParameters(weight, modifier_rank=0):
            if dist.get_rank() == 0:
                weight.data[0].fill_(3.0)
        train(engine, [2, 3])
    assert away.get_global_grad_norm() == here.get_global_grad_norm()
    same(away, here)
    away.destroy()
    here.destroy()


@pytest.mark.parametrize("stage", [1, 3])
def test_weights_gradients_and_states_can_be_read_and_set(stage):
    with a_folder() as folder:
        run_on_ranks(2, edits, folder, stage)


@pytest.mark.parametrize("stage", [1, 3])
def test_weights_gradients_and_states_on_a_host_apart_can_be_read_and_set(stage):
    run_on_ranks(2, edits, None, stage)


def reloaded(folder):
    first, second = make_engine(folder), make_engine(folder)
    train(first, [0, 1])
    train(second, [2])
    for one, other in zip(first.module.parameters(), second.module.parameters(), strict=True):
        safe_set_full_fp32_param(other, safe_get_full_fp32_param(one))
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    train(first, [3])
    train(second, [3])
    same(first, second)
    first.destroy()
    second.destroy()


def test_the_optimizer_s_state_dict_moves_between_engines():
    with a_folder() as folder:
        run_on_ranks(2, reloaded, folder)


def rescheduled(folder):
    engines = [make_engine(folder), make_engine(folder)]
    for engine in engines:
        train(engine, [0])
    engines[1].optimizer.load_state_dict(engines[1].optimizer.state_dict())
    for engine in engines:
        for group in engine.optimizer.param_groups:
            group["lr"] = 0.3
        train(engine, [1, 2])
    same(*engines)
    assert all(group["params"] for group in engines[1].optimizer.param_groups)
    for engine in engines:
        engine.destroy()


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_learning_rate_that_is_set_after_load_state_dict_counts(on_disk):
    with a_folder() as folder:
        run_on_ranks(1, rescheduled, folder if on_disk else None)


def any_optimizer(folder, make):
    engines = []
    for place in (folder, None):
        model = make_toy()
        config = config_for(
            2,
            "bf16",
            1,
            0.5,
            sub_group_size=16,
            offload_optimizer={"device": "nvme", "nvme_path": folder} if place else {"device": "none"},
        )
        del config["optimizer"]
        engines.append(
            deepspeed.initialize(model=model, config=config, optimizer=make(model.parameters()))[0]
        )
        train(engines[-1], range(3))
    for one, other in zip(*(engine.module.parameters() for engine in engines), strict=True):
        torch.testing.assert_close(safe_get_full_fp32_param(one), safe_get_full_fp32_param(other))
    for engine in engines:
        engine.destroy()


def sgd(params):
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def adamw(params):
    return torch.optim.AdamW(params, lr=0.01, weight_decay=0.1)


@pytest.mark.parametrize("make", [sgd, adamw])
def test_any_optimizer_works_on_tiles(make):
    with a_folder() as folder:
        run_on_ranks(2, any_optimizer, folder, make)


class CountsInItsGroup(torch.optim.SGD):
    """An optimizer that counts its steps once for a whole group, and shrinks them."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["taken"] = group.get("taken", 0) + 1
            group["lr"] = 0.1 / group["taken"]
        return super().step(closure)


def counting(folder):
    engine = make_engine(folder, optimizer=lambda params: CountsInItsGroup(params, lr=0.1))
    with pytest.raises(UsageError, match="CountsInItsGroup"):
        train(engine, [0])
    engine.destroy()


def test_an_optimizer_that_counts_steps_in_its_groups_is_refused_by_name():
    with tempfile.TemporaryDirectory() as folder:
        run_on_ranks(1, counting, folder)


def memory(folder):
    engine = make_engine(folder, stage=2)
    train(engine, range(2))
    report = engine.memory_report()
    steps = sum(len(leaves) for leaves in engine.optimizer.states.leaves.values())
    assert (report.masters, report.optimizer) == (0, 4 * steps)
    trained = sum(param.numel() for param in engine.module.parameters())
    assert report.on_disk * dist.get_world_size() >= 12 * trained
    assert "on disk" in str(report)
    engine.destroy()


def test_memory_report_tells_what_is_on_disk():
    with a_folder() as folder:
        run_on_ranks(2, memory, folder)


def broken(folder, missing_on):
    path = folder if dist.get_rank() != missing_on else str(Path(folder) / "nowhere")
    with pytest.raises(OffloadError, match="nowhere"):
        make_engine(path)


def test_a_missing_folder_on_one_rank_is_an_error_on_all():
    with a_folder() as folder:
        run_on_ranks(2, broken, folder, 1)


def full(folder, moment):
    """A disk that is full on one rank: from the first byte on, or once the optimizer makes its states."""
    reserve, left = SwapFolder.reserve, [0 if moment == "start" else 200]

    def short(self, nbytes):
        left[0] -= 1
        if left[0] < 0 and dist.get_rank() == 1:
            raise OffloadError(f"reserve {nbytes} bytes: No space left on device")
        return reserve(self, nbytes)

    SwapFolder.reserve = short
    try:
        if moment == "start":
            with pytest.raises(OffloadError, match="No space left"):
                make_engine(folder)
            return
        engine = make_engine(folder)
        left[0] = 3
        with pytest.raises(OffloadError, match="No space left"):
            train(engine, range(3))
        engine.destroy()
    finally:
        SwapFolder.reserve = reserve


@pytest.mark.parametrize("moment", ["start", "step"])
def test_a_full_disk_on_one_rank_is_an_error_on_all(moment):
    with tempfile.TemporaryDirectory() as folder:
        run_on_ranks(2, full, folder, moment)


def full_while_gradients_land(folder):
    engine = make_engine(folder, gas=2)
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(SwapFolder, "reserve", no_space)
        with pytest.raises(OffloadError, match="No space left"):
            train(engine, [0], gas=2)
    with pytest.raises(OffloadError, match="No space left"):
        train(engine, [1], gas=2)
    engine.destroy()


def test_a_disk_that_gets_full_while_gradients_accumulate_is_an_error_on_all():
    with a_folder() as folder:
        run_on_ranks(2, full_while_gradients_land, folder)


def no_space(self, nbytes):
    raise OffloadError(f"reserve {nbytes} bytes: No space left on device")


def full_when(folder, method):
    """A disk that is full on one rank from a call of `LeafStates` on; `split` needs a parameter without gradient."""

    def then_full(self, *args):
        if dist.get_rank() == 1:
            patch.setattr(SwapFolder, "reserve", no_space)
        return original(self, *args)

    def start_and_train():
        engines.append(make_engine(folder, model=make_toy(unused=True)))
        train(engines[0], range(3))

    original, engines = getattr(LeafStates, method), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LeafStates, method, then_full)
        with pytest.raises(OffloadError, match="No space left"):
            start_and_train()
    for engine in engines:
        with pytest.raises(
            OffloadError, match="No space left"
        ):  # there is some again, but half an update is done
            train(engine, [3])
        engine.destroy()


@pytest.mark.parametrize("method", ["lay_out", "split", "visit"])
def test_a_disk_that_gets_full_is_an_error_on_all_and_stays_one(method):
    with tempfile.TemporaryDirectory() as folder:
        run_on_ranks(2, full_when, folder, method)


def room(folder):
    engine = make_engine(folder, precision="fp32", sub_group_size=10**9, model=nn.Linear(512, 512))
    masters = 4 * sum(param.numel() for param in engine.module.parameters())
    assert engine.optimizer.states._tier.file.size < 1.5 * masters
    engine.destroy()


def test_a_start_takes_no_more_of_the_disk_than_masters_do():
    with a_folder() as folder:
        run_on_ranks(1, room, folder)


def open_in(folder):
    """Files in a folder that this process has open, removed ones too."""
    links = []
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the descriptor of the listing
            links.append(os.readlink(f"/proc/self/fd/{name}"))
    return [link for link in links if link.startswith(folder)]


def come_and_go(folder, end):
    weights = {"device": "nvme", "nvme_path": folder, "max_in_cpu": 0}
    for _ in range(3):
        engine = make_engine(folder, offload_param=weights)
        train(engine, range(2))
        module = weakref.ref(engine.module)
        if end == "destroy":
            engine.destroy()
        del engine
        gc.collect()
        assert module() is None
        assert not open_in(folder)
        assert not [one for one in os.listdir(folder) if one.endswith(f"rank{dist.get_rank()}")]
    for thread in threading.enumerate():
        if thread.name.startswith("deepspeed-disk"):
            thread.join(10)
            assert not thread.is_alive()


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("end", ["destroy", "forget"])
def test_engines_that_come_and_go_leave_no_file_descriptor_or_thread(ranks, end):
    with a_folder() as folder:
        run_on_ranks(ranks, come_and_go, folder, end)


@contextmanager
def unwritable():
    """A disk on which nothing can be written."""

    def transfer(self, writes, *args):
        if writes:
            raise OffloadError("cannot go on")
        return original(self, writes, *args)

    original = DataFile.transfer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DataFile, "transfer", transfer)
        yield


def fail_to_start(folder, stage):
    with (
        unwritable() if dist.get_rank() == 1 else nullcontext(),
        pytest.raises(OffloadError, match="cannot go on"),
    ):
        make_engine(folder, stage)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_disk_that_fails_one_rank_at_the_start_is_an_error_on_all(stage):
    with tempfile.TemporaryDirectory() as folder:
        run_on_ranks(2, fail_to_start, folder, stage)


def fail_to_load(folder, checkpoints, stage):
    engine = make_engine(folder, stage)
    train(engine, [0])
    load = partial(engine.optimizer.load_state_dict, engine.optimizer.state_dict())
    if checkpoints:
        engine.save_checkpoint(checkpoints)
        load = partial(engine.load_checkpoint, checkpoints)
    with (
        unwritable() if dist.get_rank() == 1 else nullcontext(),
        pytest.raises(OffloadError, match="cannot go on"),
    ):
        load()
    engine.destroy()


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("what", ["state_dict", "checkpoint"])
def test_a_disk_that_fails_one_rank_while_states_are_loaded_is_an_error_on_all(what, stage, tmp_path):
    with a_folder() as folder:
        run_on_ranks(2, fail_to_load, folder, tmp_path if what == "checkpoint" else None, stage)


def cannot_read(self, parcel):
    raise OffloadError("cannot go on")


def fail_to_set(folder):
    engine = make_engine(folder, 3)
    train(engine, [0])
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(DiskTier, "fetch", cannot_read)
        for param in engine.module.parameters():
            safe_set_full_fp32_param(param, torch.ones(param.ds_shape))
    with pytest.raises(OffloadError, match="cannot go on"):
        train(engine, [1])
    engine.destroy()


def test_a_disk_that_fails_one_rank_while_a_weight_is_set_is_an_error_of_the_next_step_on_all():
    with a_folder() as folder:
        run_on_ranks(2, fail_to_set, folder)


def fail_to_access(folder):
    engine = make_engine(folder, 3)
    train(engine, [0])
    engine.backward(engine(toy_batch(1, 0, dist.get_rank())[0]).float().square().mean())
    weight, ones = engine.module.embed.weight, torch.ones(11, 6)
    for access in (
        lambda: safe_get_full_fp32_param(weight),
        lambda: safe_get_full_grad(weight),
        lambda: safe_get_full_optimizer_state(weight, "exp_avg"),
        lambda: safe_set_full_grad(weight, ones),
        lambda: safe_set_full_optimizer_state(weight, ones, "exp_avg"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            if dist.get_rank() == 1:
                patch.setattr(DiskTier, "fetch", cannot_read)
            with pytest.raises(OffloadError, match="cannot go on"):
                access()
    engine.destroy()


def test_a_disk_that_fails_one_rank_while_a_value_is_read_or_set_is_an_error_on_all():
    with a_folder() as folder:
        run_on_ranks(2, fail_to_access, folder)


def fewer_elements_than_ranks(folder, stage):
    engines = [make_engine(place, stage, "fp32", model=nn.Linear(1, 1)) for place in (folder, None)]
    safe_set_full_fp32_param(engines[0].module.weight, safe_get_full_fp32_param(engines[1].module.weight))
    safe_set_full_fp32_param(engines[0].module.bias, safe_get_full_fp32_param(engines[1].module.bias))
    for engine in engines:
        for _ in range(2):
            engine.backward(engine(torch.ones(3, 1)).sum())
            engine.step()
    same(*engines)
    for engine in engines:
        engine.destroy()


@pytest.mark.parametrize("stage", [1, 3])
def test_a_rank_that_has_no_element_of_the_states_takes_part(stage):
    with a_folder() as folder:
        run_on_ranks(3, fewer_elements_than_ranks, folder, stage)


SCRIPT = """
import os, signal, sys
sys.path[:0] = {paths!r}
os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="{port}")
from test_states_on_disk import make_engine, train
from deepspeed.zero.states import LeafStates
engine = make_engine({folder!r})
train(engine, [0])
if {dies}:
    put, left = LeafStates._put, [4]
    def dying(self, leaf):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        put(self, leaf)
    LeafStates._put = dying
train(engine, [1])
print(float(engine.get_global_grad_norm()))
"""


def run(folder, dies):
    here = Path(__file__).parent
    paths = [str(here), str(here.parent)]
    code = SCRIPT.format(paths=paths, folder=folder, dies=dies, port=free_port())
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def free_port():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_job_killed_in_the_middle_of_an_update_leaves_nothing_behind_for_the_next():
    with tempfile.TemporaryDirectory() as folder:
        killed = run(folder, True)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert os.listdir(folder)
        again = run(folder, False)
        assert again.returncode == 0, again.stderr
        assert not os.listdir(folder)
        with tempfile.TemporaryDirectory() as other:
            assert run(other, False).stdout == again.stdout
