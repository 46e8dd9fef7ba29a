"""``ds_ckpt`` reads what the original DeepSpeed wrote like anything else, and writes it as one of this release."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from checkpoint_runs import compare, everything
from harness import run_on_ranks
from original_cases import CASES, case_config, case_groups, case_model, case_optimizer

import deepspeed
from deepspeed.checkpoint.tools import main as ds_ckpt

FOLDER = Path(__file__).parent / "original"


def call(capsys, *args):
    """Run the command; return its exit code and what it prints."""
    code = 0
    try:
        ds_ckpt.main([str(arg) for arg in args])
    except SystemExit as ended:
        code = ended.code
    said = capsys.readouterr()
    if "--json" in args and code != 2:
        return code, json.loads(said.out)
    return code, said.err if code == 2 else said.out


@pytest.mark.parametrize("name", CASES)
def test_an_imported_checkpoint_equals_the_original_and_is_whole(name, tmp_path, capsys):
    code, said = call(capsys, "import", FOLDER / name, tmp_path)
    assert code == 0
    assert "of DeepSpeed 0.19" in said
    assert call(capsys, "verify", tmp_path)[0] == 0
    code, record = call(capsys, "diff", FOLDER / name, tmp_path, "--json")
    assert (code, record["values"], record["others"]) == (0, [], [])
    assert record["compared"] > 4
    assert (tmp_path / "latest").read_text() == "global_step2"


def make_engine(case):
    model = case_model(case, seed=7)
    optimizer = case_optimizer(case, model)
    return deepspeed.initialize(
        model=model,
        config=case_config(case),
        optimizer=optimizer,
        model_parameters=None if optimizer is not None else case_groups(case, model),
    )[0]


def loaded(folder, case):
    engine = make_engine(case)
    path, client = engine.load_checkpoint(folder)
    assert path is not None
    state = everything(engine)
    rate = engine.get_lr()
    steps = engine.global_steps, engine.global_samples
    engine.destroy()
    return state, client.keys(), rate, steps


def both_loaded(name, folder):
    one, other = loaded(str(FOLDER / name), CASES[name]), loaded(folder, CASES[name])
    compare(one[0], other[0])
    assert one[1:] == other[1:]


@pytest.mark.parametrize("name", ["stage1-fp16-groups", "stage3-bf16-3ranks", "stage0-bf16"])
def test_an_imported_checkpoint_loads_like_the_original(name, tmp_path, capsys):
    assert call(capsys, "import", FOLDER / name, tmp_path)[0] == 0
    run_on_ranks(2, both_loaded, name, str(tmp_path))


def test_list_show_and_verify_read_the_original_s_files(capsys):
    _, (one,) = call(capsys, "list", FOLDER / "stage2-bf16", "--json")
    assert (one["tag"], one["state"], one["step"], one["stage"], one["ranks"], one["latest"]) == (
        "global_step2",
        "original",
        2,
        2,
        2,
        True,
    )
    assert call(capsys, "verify", FOLDER / "stage2-bf16")[0] == 0
    _, record = call(capsys, "show", FOLDER / "stage2-bf16", "--stats", "--json")
    roles = {one["name"]: one["role"] for one in record["tensors"]}
    assert roles["shift"] == "buffer"
    assert roles["inner.weight"] == "frozen"
    assert roles["outer.weight"] == "trained"
    truth = torch.load(FOLDER / "stage2-bf16" / "truth.pt", weights_only=True)["now"]
    for one in record["tensors"]:
        if one["role"] == "trained":
            mean = one["values"]["master"]["stats"]["mean"]
            assert mean == pytest.approx(float(truth["master"][one["name"]].double().mean()))


def test_export_gives_the_original_s_masters(tmp_path, capsys):
    assert call(capsys, "export", FOLDER / "stage2-bf16", tmp_path, "--format", "bin")[0] == 0
    found = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    truth = torch.load(FOLDER / "stage2-bf16" / "truth.pt", weights_only=True)["now"]
    for name, master in truth["master"].items():
        torch.testing.assert_close(found[name], master, rtol=0, atol=0)


def test_a_damaged_original_is_found_and_not_imported(tmp_path, capsys):
    shutil.copytree(FOLDER / "stage2-bf16", tmp_path / "kept")
    path = tmp_path / "kept" / "global_step2" / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    with zipfile.ZipFile(path) as archive:
        info = max(archive.infolist(), key=lambda one: one.file_size)
    data = bytearray(path.read_bytes())
    data[info.header_offset + info.file_size] ^= 1
    path.write_bytes(data)
    code, said = call(capsys, "verify", tmp_path / "kept")
    assert code == 1
    assert f"{path.name}: damaged" in said
    code, said = call(capsys, "import", tmp_path / "kept", tmp_path / "out")
    assert code == 2
    assert f"{path.name}: damaged" in said
    assert not (tmp_path / "out" / "global_step2").exists()
    path.unlink()
    _, (one,) = call(capsys, "list", tmp_path / "kept", "--json")
    assert one["state"] == "damaged"
    assert f"{path.name}: missing" in one["problem"]


def test_verify_finds_all_damages_of_an_original(tmp_path, capsys):
    shutil.copytree(FOLDER / "stage2-bf16", tmp_path / "kept")
    folder = tmp_path / "kept" / "global_step2"
    damaged = sorted(folder.glob("*_states.pt"))
    for path in damaged[:2]:
        with zipfile.ZipFile(path) as archive:
            infos = sorted(archive.infolist(), key=lambda one: one.file_size)[-2:]
        data = bytearray(path.read_bytes())
        for info in infos:
            data[info.header_offset + info.file_size] ^= 1
        path.write_bytes(data)
    damaged[2].unlink()
    code, found = call(capsys, "verify", tmp_path / "kept", "--json")
    texts = [one["text"] for one in found["checkpoints"][0]["damages"]]
    assert code == 1
    assert [sum(f"{path.name}: damaged" in text for text in texts) for path in damaged[:2]] == [2, 2]
    assert f"{damaged[2].name}: missing" in texts[-1]
    assert len(texts) == 5


def test_what_is_there_already_is_not_imported(tmp_path, capsys):
    case = FOLDER / "stage1-bf16"
    assert call(capsys, "import", case, tmp_path)[0] == 0
    code, said = call(capsys, "import", case, tmp_path)
    assert code == 2
    assert "has a checkpoint 'global_step2' already; name another folder" in said
    code, said = call(capsys, "import", tmp_path, tmp_path / "more")
    assert code == 2
    assert "is a checkpoint of this release; copy its folder to" in said
