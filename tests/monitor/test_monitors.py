"""Each monitor writes what it was given, where it was told to."""

import csv
import os
import sys
from types import ModuleType, SimpleNamespace

import pytest
from harness import on_ranks

from deepspeed.errors import ConfigError
from deepspeed.monitor import (
    CometMonitor,
    CsvMonitor,
    MonitorMaster,
    TensorBoardMonitor,
    WandbMonitor,
    build_monitors,
)

EVENTS = [
    ("Train/Samples/lr", 0.5, 10),
    ("Train/Samples/lr", 0.25, 20),
    ("Train/Samples/train_loss", 3.0, 10),
]


def section(folder, enabled=True):
    return SimpleNamespace(enabled=enabled, output_path=str(folder), job_name="job")


def test_csv_has_a_file_per_name_with_step_and_value(tmp_path):
    monitor = CsvMonitor(str(tmp_path), "job")
    monitor.write(EVENTS)
    monitor.close()
    assert sorted(os.listdir(tmp_path / "job")) == ["Train_Samples_lr.csv", "Train_Samples_train_loss.csv"]
    with open(tmp_path / "job" / "Train_Samples_lr.csv", newline="") as file:
        assert list(csv.reader(file)) == [["step", "value"], ["10", "0.5"], ["20", "0.25"]]


def test_csv_goes_on_with_an_existing_file(tmp_path):
    for step in (1, 2):
        CsvMonitor(str(tmp_path), "job").write([("a", 1.0, step)])
    assert (tmp_path / "job" / "a.csv").read_text().splitlines() == ["step,value", "1,1.0", "2,1.0"]


@pytest.mark.parametrize(
    ("name", "file"),
    [("../../etc/x", "etc_x.csv"), ("a b:c*", "a_b_c.csv"), ("größe", "größe.csv"), ("..", "event.csv")],
)
def test_csv_file_names_are_safe(tmp_path, name, file):
    monitor = CsvMonitor(str(tmp_path), "job")
    assert monitor.path(name) == str(tmp_path / "job" / file)


def test_tensorboard_reads_back_what_was_written(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monitor = TensorBoardMonitor(str(tmp_path), "job")
    monitor.write(EVENTS)
    monitor.close()
    read = EventAccumulator(str(tmp_path / "job"))
    read.Reload()
    assert [(one.step, one.value) for one in read.Scalars("Train/Samples/lr")] == [(10, 0.5), (20, 0.25)]
    assert read.Tags()["scalars"] == ["Train/Samples/lr", "Train/Samples/train_loss"]


class FakeRun:
    def __init__(self):
        self.logged, self.finished = [], 0

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


def fake_wandb(run):
    module = ModuleType("wandb")
    module.run = run
    module.settings = None

    def init(**settings):
        module.settings = settings
        return FakeRun()

    module.init = init
    return module


def test_wandb_logs_the_events_of_a_step_together(monkeypatch):
    module = fake_wandb(None)
    monkeypatch.setitem(sys.modules, "wandb", module)
    monitor = WandbMonitor("project", "group", "team")
    monitor.write([EVENTS[0], EVENTS[2], EVENTS[1]])
    monitor.close()
    assert module.settings == {"project": "project", "group": "group", "entity": "team"}
    assert monitor.run.logged == [
        (10, {"Train/Samples/lr": 0.5, "Train/Samples/train_loss": 3.0}),
        (20, {"Train/Samples/lr": 0.25}),
    ]
    assert monitor.run.finished == 1


def test_wandb_leaves_a_scripts_own_run_open(monkeypatch):
    run = FakeRun()
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(run))
    monitor = WandbMonitor()
    monitor.close()
    assert monitor.run is run
    assert run.finished == 0


class FakeExperiment:
    def __init__(self):
        self.logged, self.name, self.ended = [], None, False

    def set_name(self, name):
        self.name = name

    def log_metric(self, name, value, step):
        self.logged.append((name, value, step))

    def end(self):
        self.ended = True


@pytest.fixture
def comet(monkeypatch):
    module = ModuleType("comet_ml")
    module.settings = None

    def start(**settings):
        module.settings = settings
        return FakeExperiment()

    module.start = start
    monkeypatch.setitem(sys.modules, "comet_ml", module)
    return module


def test_comet_keeps_the_interval_between_points_of_a_name(comet):
    monitor = CometMonitor(100, project="p", mode="create", experiment_name="mine")
    monitor.write([("a", 1.0, 0), ("b", 2.0, 0), ("a", 3.0, 64), ("a", 4.0, 128), ("b", 5.0, 99)])
    monitor.close()
    experiment = monitor.experiment
    assert experiment.logged == [("a", 1.0, 0), ("b", 2.0, 0), ("a", 4.0, 128)]
    assert (experiment.name, experiment.ended) == ("mine", True)
    assert comet.settings["project"] == "p"
    assert comet.settings["mode"] == "create"
    assert comet.settings["api_key"] is None


@pytest.mark.parametrize(
    ("make", "module", "package", "key"),
    [
        (TensorBoardMonitor, "torch.utils.tensorboard", "tensorboard", "tensorboard"),
        (WandbMonitor, "wandb", "wandb", "wandb"),
        (CometMonitor, "comet_ml", "comet-ml", "comet"),
    ],
)
def test_a_missing_package_is_named_with_the_way_to_install_it(monkeypatch, make, module, package, key):
    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"{key}.enabled: .* {package} .*deepspeed\[monitors\]"):
        make()


def test_only_enabled_monitors_are_made(tmp_path):
    off = section(tmp_path, enabled=False)
    monitors = build_monitors(tensorboard=off, wandb=off, csv=section(tmp_path), comet=off)
    assert [type(one) for one in monitors] == [CsvMonitor]
    assert build_monitors() == []


def test_the_master_writes_to_all(tmp_path, comet):
    pytest.importorskip("tensorboard")
    comet_section = SimpleNamespace(
        enabled=True, samples_log_interval=1, project=None, workspace=None, api_key=None,
        experiment_name=None, experiment_key=None, online=None, mode=None,
    )  # fmt: skip
    config = SimpleNamespace(
        tensorboard=section(tmp_path / "tb"),
        csv_monitor=section(tmp_path / "csv"),
        wandb=section(tmp_path, enabled=False),
        comet=comet_section,
    )
    master = MonitorMaster(config)
    assert master.enabled
    assert [type(one) for one in master.monitors] == [TensorBoardMonitor, CsvMonitor, CometMonitor]
    master.write_events(EVENTS)
    master.close()
    assert len(os.listdir(tmp_path / "csv" / "job")) == 2
    assert len(os.listdir(tmp_path / "tb" / "job")) == 1


@on_ranks(2)
def test_only_rank_zero_writes():
    import tempfile

    import torch.distributed as dist

    with tempfile.TemporaryDirectory() as folder:
        monitors = build_monitors(csv=section(folder))
        assert len(monitors) == (1 if dist.get_rank() == 0 else 0)
