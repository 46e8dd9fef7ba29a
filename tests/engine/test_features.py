"""What joins the engine: monitors, progress lines, timers, the log of collectives, and the loaders it makes."""

import csv
import sys
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from harness import on_ranks
from torch import nn

import deepspeed
from deepspeed import comm
from deepspeed.comm.log import comms_logger
from deepspeed.common.logging import logger
from deepspeed.errors import UsageError
from deepspeed.utils import groups

NAMES = {"train_loss", "lr", "loss_scale", "grad_norm", "samples_per_sec", "memory_gib"}


def train(steps=3, **more):
    """Train one weight w on the loss w * (rank + 1); return the engine."""
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "SGD", "params": {"lr": 0.5}},
        **more,
    }
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    engine, *_ = deepspeed.initialize(model=model, config=config)
    for _ in range(steps):
        engine.backward(engine(torch.full((1, 1), 1.0 + dist.get_rank())).mean())
        engine.step()
    return engine


def shared_folder():
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    return Path(folder[0])


@on_ranks(2)
def test_csv_has_every_number_of_every_step_once():
    folder = shared_folder()
    section = {"enabled": True, "output_path": str(folder), "job_name": "job"}
    train(csv_monitor=section, gradient_clipping=0.0).destroy()
    dist.barrier()
    values = {}
    for path in (folder / "job").iterdir():
        with path.open(newline="") as file:
            values[path.stem.removeprefix("Train_Samples_")] = list(csv.reader(file))[1:]
    assert values.keys() == NAMES
    assert [int(step) for step, _ in values["train_loss"]] == [2, 4, 6]
    assert [float(loss) for _, loss in values["train_loss"]] == pytest.approx([1.5, 0.375, -0.75])
    assert [float(norm) for _, norm in values["grad_norm"]] == pytest.approx([1.5] * 3)
    assert [float(lr) for _, lr in values["lr"]] == [0.5] * 3
    assert all(float(memory) > 0 for _, memory in values["memory_gib"])


@on_ranks(1)
def test_tensorboard_reads_back_the_loss_of_each_step():
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tempfile.mkdtemp()
    train(tensorboard={"enabled": True, "output_path": folder, "job_name": "job"}).destroy()
    read = EventAccumulator(f"{folder}/job")
    read.Reload()
    losses = [one.value for one in read.Scalars("Train/Samples/train_loss")]
    assert losses == pytest.approx([1.0, 0.5, 0.0], abs=1e-5)
    assert {tag.removeprefix("Train/Samples/") for tag in read.Tags()["scalars"]} == NAMES


@on_ranks(1)
def test_wandb_and_comet_get_each_step():
    logged = []
    run = SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: None)
    wandb, comet = ModuleType("wandb"), ModuleType("comet_ml")
    wandb.run, wandb.init = None, lambda **_: run
    metrics = []
    experiment = SimpleNamespace(
        log_metric=lambda name, value, step: metrics.append((name, step)), end=lambda: metrics.append("end")
    )
    comet.start = lambda **_: experiment
    sys.modules.update(wandb=wandb, comet_ml=comet)
    try:
        train(wandb={"enabled": True}, comet={"enabled": True, "samples_log_interval": 2}).destroy()
    finally:
        del sys.modules["wandb"], sys.modules["comet_ml"]
    assert [step for step, _ in logged] == [1, 2, 3]
    assert {name.removeprefix("Train/Samples/") for name in logged[0][1]} == NAMES
    assert [step for name, step in metrics[:-1] if name.endswith("train_loss")] == [1, 3]
    assert metrics[-1] == "end"


@on_ranks(1)
def test_progress_and_times_are_lines_of_the_log():
    lines = []
    handler = SimpleNamespace(level=0, handle=lambda record: lines.append(record.getMessage()))
    logger.addHandler(handler)
    try:
        train(steps=4, steps_per_print=2, wall_clock_breakdown=True, memory_breakdown=True)
    finally:
        logger.removeHandler(handler)
    progress = [line for line in lines if line.startswith("step ")]
    assert [line.split(":")[0] for line in progress] == ["step 2", "step 4"]
    assert "loss 0.75, lr 0.5, grad norm 1, " in progress[0]
    assert sum(line.startswith("time of step") for line in lines) == 4
    assert sum(line.startswith("memory after") for line in lines) == 12


@on_ranks(1)
def test_a_loss_that_the_engine_never_saw_is_not_reported():
    folder = Path(tempfile.mkdtemp())
    section = {"enabled": True, "output_path": str(folder), "job_name": "job"}
    engine = train(steps=0, csv_monitor=section)
    engine(torch.ones(1, 1)).mean().backward()
    engine.step()
    engine.destroy()
    found = {path.stem.removeprefix("Train_Samples_") for path in (folder / "job").iterdir()}
    assert found == NAMES - {"train_loss"}


@on_ranks(1)
def test_losses_between_progress_lines_take_no_memory():
    engine = train(steps=50, steps_per_print=1000)
    metrics = engine._features[0]
    assert not any(isinstance(value, list) for value in vars(metrics).values())


@on_ranks(2)
def test_the_log_of_collectives_counts_an_engines_traffic():
    comms_logger.reset()
    engine = train(steps=2, comms_logger={"enabled": True}, zero_optimization={"stage": 2})
    counts = {name: tally.count for (name, _), tally in comms_logger.tallies.items()}
    comm.configure(enabled=False)
    assert counts["reduce_scatter_single"] == 2
    assert counts["all_gather_single"] == 2
    sizes = dict(comms_logger.tallies.keys())
    assert sizes["reduce_scatter_single"] == 4 * engine.optimizer.units[0].layout.total
    comms_logger.reset()


@on_ranks(2)
def test_verbose_shows_each_collective_and_the_summary_has_a_row_for_each():
    import contextlib
    import io

    comms_logger.reset()
    lines, shown = [], io.StringIO()
    handler = SimpleNamespace(level=0, handle=lambda record: lines.append(record.getMessage()))
    logger.addHandler(handler)
    try:
        section = {"enabled": True, "verbose": True, "debug": True}
        train(steps=2, comms_logger=section, zero_optimization={"stage": 1})
    finally:
        comm.configure(enabled=False, verbose=False, debug=False)
        logger.removeHandler(handler)
    with contextlib.redirect_stdout(shown):
        comm.log_summary()
    calls = [line for line in lines if line.startswith("comm reduce_scatter_single |")]
    assert len(calls) == 2
    assert " | from " in calls[0]
    if dist.get_rank() == 0:
        rows = [line.split()[0] for line in shown.getvalue().splitlines()]
        assert rows[0] == "operation"
        assert {"all_gather_single", "reduce_scatter_single"} <= {*rows}
    comms_logger.reset()


@on_ranks(1)
def test_a_loader_takes_the_originals_arguments_by_place():
    engine = train(steps=0)
    loader = engine.deepspeed_io(list(range(4)), 2, "predict", pin_memory=True)
    assert [batch.tolist() for batch in loader] == [[0, 1], [2, 3]]


@on_ranks(2)
def test_the_engine_makes_loaders_for_its_ranks():
    engine = train(steps=0)
    dataset = list(range(10))
    rank = dist.get_rank()
    kept = engine.deepspeed_io(dataset, 5, route="eval", num_local_io_workers=0, pin_memory=False)
    assert [batch.tolist() for batch in kept] == [list(range(rank, 10, 2))]
    loader = engine.deepspeed_io(dataset)
    assert len(loader) == 5
    assert [batch.tolist() for batch in loader] != [batch.tolist() for batch in loader]
    chosen = engine.deepspeed_io(dataset, 2, data_sampler=[3, 1], collate_fn=tuple)
    assert list(chosen) == [(3, 1)]
    with pytest.raises(UsageError, match='expected route "train"'):
        engine.deepspeed_io(dataset, route="test")


class Unit:
    """A model-parallel unit: pairs of ranks share a model."""

    def __init__(self):
        columns = [dist.new_group([0, 2]), dist.new_group([1, 3])]
        rows = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        self.column, self.row = columns[dist.get_rank() % 2], rows[dist.get_rank() // 2]

    def get_data_parallel_group(self):
        return self.column

    def get_model_parallel_group(self):
        return self.row


@on_ranks(4)
def test_groups_are_those_of_the_model_parallel_unit():
    config = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "SGD", "params": {"lr": 0.5}}}
    engine, *_ = deepspeed.initialize(model=nn.Linear(1, 1), config=config, mpu=Unit())
    assert engine.train_batch_size() == 2
    assert groups._get_data_parallel_world_size() == groups._get_model_parallel_world_size() == 2
    assert groups._get_data_parallel_rank() == dist.get_rank() // 2
    assert groups._get_model_parallel_rank() == dist.get_rank() % 2
    deepspeed.initialize(model=nn.Linear(1, 1), config=config)
    assert groups._get_data_parallel_world_size() == 4
    assert groups._get_model_parallel_group() is None


@on_ranks(2)
def test_an_axis_that_the_unit_does_not_know_is_this_rank_alone():
    unit = SimpleNamespace(get_data_parallel_group=lambda: dist.group.WORLD)
    config = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "SGD", "params": {"lr": 0.5}}}
    deepspeed.initialize(model=nn.Linear(1, 1), config=config, mpu=unit)
    assert groups.get_data_parallel_world_size() == 2
    assert groups.get_model_parallel_world_size() == groups._get_sequence_parallel_world_size() == 1
    assert groups._get_tensor_model_parallel_rank() == 0
    unit.get_sequence_parallel_group = lambda: dist.group.WORLD
    assert groups._get_sequence_parallel_world_size() == 2
    deepspeed.initialize(model=nn.Linear(1, 1), config=config)
