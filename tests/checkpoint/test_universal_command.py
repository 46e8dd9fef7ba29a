"""ds_to_universal makes a checkpoint that loads like the one it is given."""

from __future__ import annotations

import contextlib
import io
import tempfile
from pathlib import Path

import pytest
from checkpoint_runs import compare, everything, make_engine, train
from harness import run_on_ranks
from test_damage import flip

from deepspeed import checkpoint
from deepspeed.checkpoint import constants, ds_to_universal


def command(*args):
    """Run it; return what it printed."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        ds_to_universal.main([str(arg) for arg in args])
    return said.getvalue()


def converts(folder):
    engine = make_engine(2, "bf16")
    train(engine, [0])
    engine.save_checkpoint(folder)
    place = Path(folder)
    source, made = place / "global_step1", place / "universal" / "step1"
    said = command("--input_folder", source, "--output_folder", made, "--inject_missing_state")
    assert said.count("\n") == 1
    assert "every checkpoint loads at any world size and stage" in said
    expected = everything(engine)
    for load_dir, tag in ((place / "universal", None), (place / "universal", "step1")):
        other = make_engine(3, "bf16", seed=3)
        path, _ = other.load_checkpoint(load_dir, tag=tag)
        assert path == str(made)
        compare(everything(other), expected)
        other.destroy()
    command("--input_folder", folder, "--output_folder", place / "global_step1_universal")
    assert (place / "latest").read_text() == "global_step1"
    engine.load_checkpoint(folder, tag="global_step1_universal")
    engine.destroy()


def test_a_checkpoint_is_copied_and_loads_anywhere():
    with tempfile.TemporaryDirectory() as folder:
        run_on_ranks(1, converts, folder)


def one_checkpoint(folder):
    engine = make_engine(3)
    engine.save_checkpoint(folder)
    engine.destroy()


def refused(capsys, *folders):
    with pytest.raises(SystemExit) as ended:
        ds_to_universal.main(["--input_folder", str(folders[0]), "--output_folder", str(folders[1])])
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_what_cannot_be_copied_is_said(tmp_path, capsys, monkeypatch):
    run_on_ranks(1, one_checkpoint, str(tmp_path))
    source = tmp_path / "global_step0"
    assert "expected another folder than the input" in refused(capsys, source, source)
    assert "there is no" in refused(capsys, tmp_path / "nothing", tmp_path / "new")
    monkeypatch.chdir(tmp_path)
    assert "none above it, got ." in refused(capsys, "global_step0", ".")
    assert "/proc/none" in refused(capsys, source, "/proc/none/new")
    other = Path(__file__).parent / "original" / "stage2-bf16"
    assert "load_checkpoint imports it at any world size" in refused(capsys, other, tmp_path / "new")
    path = source / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    flip(path, path.stat().st_size // 2)
    assert f"{path.name}: damaged" in refused(capsys, source, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_models_that_describe_themselves_find_the_names_for_it():
    for name in checkpoint.NAMES:
        assert getattr(checkpoint, name) is getattr(constants, name)
    from deepspeed.checkpoint import UNIVERSAL_CHECKPOINT_INFO, VOCABULARY_PARAMETER_PATTERNS

    assert (UNIVERSAL_CHECKPOINT_INFO, VOCABULARY_PARAMETER_PATTERNS) == (
        "universal_checkpoint_info",
        "vocabulary_parameter_patterns",
    )
