"""ds_report tells what is here, and what a configuration means."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import deepspeed
from deepspeed import env_report
from deepspeed.ops.adam import compiled

ROOT = Path(__file__).parents[1]


@pytest.fixture
def config(tmp_path):
    def write(**values):
        path = tmp_path / "ds.json"
        path.write_text(json.dumps(values))
        return str(path)

    return write


def test_the_version_is_the_same_everywhere():
    assert version("deepspeed") == deepspeed.__version__ == deepspeed.version


def test_the_report_names_versions_devices_and_paths(capsys):
    env_report.main([])
    printed = capsys.readouterr().out
    for expected in (deepspeed.__version__, torch.__version__, "gloo", "AdamW", "tensorboard", "host memory"):
        assert expected in printed


def test_it_is_plain_text_where_there_is_no_terminal(capsys):
    env_report.main([])
    lines = capsys.readouterr().out.splitlines()
    assert "Machine" in lines
    assert not set("│─╭\x1b") & set("".join(lines))
    assert all(line == line.rstrip() for line in lines)


def test_a_reader_may_stop_early():
    shell = f"{sys.executable} -m deepspeed.env_report | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "Software\n", "")


def test_what_is_missing_is_said_to_be_the_reason(monkeypatch):
    monkeypatch.setattr(env_report, "path_in_use", lambda device: ("chunked", "no C++ compiler"))
    assert ("Adam, AdamW", "chunked: no C++ compiler") in list(env_report.paths())
    monkeypatch.undo()
    monkeypatch.delenv(compiled.SWITCH, raising=False)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    assert ("g++", "not found") in list(env_report.compilers())


def test_optional_packages_say_what_they_are_for():
    found = dict(env_report.packages())
    assert found["tensorboard"] == f"{version('tensorboard')} (the tensorboard monitor)"
    assert set(found) == set(env_report.OPTIONAL)


def test_only_variables_that_matter_are_shown():
    given = {"NCCL_DEBUG": "INFO", "WANDB_API_KEY": "secret", "OMP_NUM_THREADS": "2"}
    assert dict(env_report.variables(given)) == {"NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "2"}
    assert list(env_report.variables({})) == [("none", "that matters here is set")]


def test_a_configuration_is_shown_with_sources(config, capsys):
    env_report.main(["--config", config(train_batch_size=8, bf16={"enabled": True}), "--world", "4"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["train_batch_size", "8", "user"] in lines
    assert any(line[:1] == ["gradient_clipping"] and line[-1] == "default" for line in lines)
    assert any(line[:2] == ["train_micro_batch_size_per_gpu", "2"] for line in lines)


def test_what_is_not_built_is_shown_and_not_refused(config, capsys):
    env_report.main(
        ["--config", config(train_batch_size=8, zero_optimization={"zero_quantized_weights": True})]
    )
    assert "not built yet" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--config", "no-such.json"], "no such file"),
        (["--config", "FILE", "--world", "0"], "--world: expected at least 1, got 0"),
        (["--config", "FILE", "--world", "3"], "train_batch_size"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_an_error(config, capsys, arguments, text):
    path = config(train_batch_size=8)
    with pytest.raises(SystemExit, match="2"):
        env_report.main([path if argument == "FILE" else argument for argument in arguments])
    said = capsys.readouterr()
    assert said.err.startswith("ds_report: ")
    assert text in said.err
    assert said.out == ""
