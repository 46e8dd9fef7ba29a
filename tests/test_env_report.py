"""ds_report tells what is here, and what a configuration means."""

from __future__ import annotations

import json
from importlib.metadata import version

import pytest
import torch

from deepspeed import __version__, env_report


def test_the_version_is_the_same_everywhere():
    import deepspeed

    assert version("deepspeed") == __version__ == deepspeed.version


def test_the_report_names_versions_devices_and_paths(capsys):
    env_report.main([])
    printed = capsys.readouterr().out
    for expected in (__version__, torch.__version__, "gloo", "Adam", "tensorboard"):
        assert expected in printed


def test_no_compiler_is_said_to_be_the_reason(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert ("Adam", "chunked: no C++ compiler found") in list(env_report.paths())


def test_a_configuration_is_shown_with_sources(tmp_path, capsys):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"train_batch_size": 8, "bf16": {"enabled": True}}))
    env_report.main(["--config", str(file), "--world", "4"])
    printed = capsys.readouterr().out
    assert "train_micro_batch_size_per_gpu" in printed
    assert "user" in printed
    assert "default" in printed


def test_a_bad_configuration_is_one_sentence(tmp_path, capsys):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"train_batch_size": 8, "bf61": {}}))
    with pytest.raises(SystemExit, match="2"):
        env_report.main(["--config", str(file)])
    assert "bf16" in capsys.readouterr().err
