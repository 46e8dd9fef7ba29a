"""``ds_ckpt`` says what checkpoints there are, what is in them, what is damaged and how two differ."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from checkpoint_runs import make_engine, train
from harness import run_on_ranks
from safetensors.torch import load_file

from deepspeed.checkpoint.manifest import Manifest
from deepspeed.checkpoint.records import BLOCK, RecordWriter
from deepspeed.checkpoint.tools import contents
from deepspeed.checkpoint.tools import main as ds_ckpt
from deepspeed.checkpoint.tools.listing import in_words
from deepspeed.checkpoint.tools.showing import stats_of
from deepspeed.checkpoint.tools.verifying import verified
from deepspeed.offload.disk import Disk

CLIENT = {"epoch": 3, "best": 0.5}


def two_steps(folder, stage, precision, options):
    """Save after the second and the third step on the same data on every rank."""
    engine = make_engine(stage, precision, **options)
    train(engine, [0], ranks=1)
    for step in (1, 2):
        train(engine, [step], ranks=1)
        engine.save_checkpoint(folder, client_state=CLIENT)
    truth = {name: value.detach().clone() for name, value in engine.module_state_dict().items()}
    if dist.get_rank() == 0:
        torch.save(truth, f"{folder}/truth.pt")
    engine.destroy()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders of checkpoints of the same training: on 2 ranks at stage 3 and on 1 at stage 1, and in fp32."""
    top = tmp_path_factory.mktemp("made")
    model = {"model": {"tied": True, "frozen": True}}
    run_on_ranks(2, two_steps, str(top / "two"), 3, "bf16", model)
    run_on_ranks(1, two_steps, str(top / "one"), 1, "bf16", model)
    run_on_ranks(1, two_steps, str(top / "fp32"), 2, "fp32", model)
    return top


@pytest.fixture
def two(made, tmp_path):
    """A folder of two checkpoints that a test may change."""
    return Path(shutil.copytree(made / "two", tmp_path / "two"))


@pytest.fixture
def call(capsys):
    """Run the command; return its exit code, and what it prints: plain values with --json."""

    def run(*args):
        code = 0
        try:
            ds_ckpt.main([str(arg) for arg in args])
        except SystemExit as ended:
            code = ended.code
        said = capsys.readouterr()
        if code == 2:
            return code, said.err
        return code, json.loads(said.out) if "--json" in args else said.out

    return run


def flip(path, place):
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 4]))


def weights_file(folder, rank=0):
    return folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"


# -- list -----------------------------------------------------------------------------------------


def test_list_is_a_line_for_each_checkpoint_newest_first(two, call):
    code, said = call("list", two)
    assert code == 0
    lines = [line.split() for line in said.splitlines() if line.startswith("global_step")]
    assert [line[:6] for line in lines] == [
        ["global_step3", "3", "whole", "3", "2", "bfloat16"],
        ["global_step2", "2", "whole", "3", "2", "bfloat16"],
    ]
    assert [line[-1] == "latest" for line in lines] == [True, False]
    _, (newest, _) = call("list", two, "--json")
    files = [path for path in (two / "global_step3").iterdir() if path.is_file()]
    assert newest.pop("bytes") == sum(path.stat().st_size for path in files)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", newest.pop("written"))
    assert newest == {
        "tag": "global_step3",
        "folder": str(two / "global_step3"),
        "state": "whole",
        "latest": True,
        "step": 3,
        "stage": 3,
        "ranks": 2,
        "dtype": "bfloat16",
        "problem": None,
    }


def test_list_tells_damaged_partial_and_replaced_ones(two, call):
    weights_file(two / "global_step2", 1).unlink()
    shutil.copytree(two / "global_step3", two / ".global_step4.partial")
    shutil.copytree(two / "global_step3", two / ".global_step1.removed")
    os.rename(two / "global_step3", two / ".global_step3.old")
    (two / "latest").write_text("gone")
    _, found = call("list", two, "--json")
    states = {(one["tag"], one["folder"].rpartition("/")[2]): one["state"] for one in found}
    assert states == {
        ("global_step1", ".global_step1.removed"): "partial",
        ("global_step2", "global_step2"): "damaged",
        ("global_step3", ".global_step3.old"): "whole",
        ("global_step4", ".global_step4.partial"): "partial",
    }
    _, said = call("list", two)
    assert "zero_pp_rank_1_mp_rank_00_model_states.pt: missing" in said
    assert ".global_step4.partial: left by a save that was killed" in said
    assert "latest: names 'gone', which is not there" in said


def test_list_of_one_checkpoint_an_empty_folder_and_none(two, tmp_path, call):
    _, (one,) = call("list", two / "global_step2", "--json")
    assert (one["tag"], one["step"], one["state"]) == ("global_step2", 2, "whole")
    (tmp_path / "empty").mkdir()
    assert call("list", tmp_path / "empty") == (0, f"{tmp_path}/empty: there is no checkpoint in it\n")
    assert call("list", tmp_path / "empty", "--json") == (0, [])
    code, said = call("list", tmp_path / "no")
    assert code == 2
    assert "no: there is no such folder" in said


def test_ages_are_in_their_largest_unit():
    assert [in_words(span) for span in (0, 90, 150, 7300, 3 * 86400)] == [
        "0 s",
        "90 s",
        "2 min",
        "2 h",
        "3 days",
    ]


# -- verify ---------------------------------------------------------------------------------------


def test_verify_of_whole_checkpoints(two, call):
    code, said = call("verify", two)
    assert code == 0
    assert re.search(r"global_step3 +whole", said)
    code, record = call("verify", two, "--all", "--json")
    assert code == 0
    assert [(one["tag"], one["whole"]) for one in record["checkpoints"]] == [
        ("global_step3", True),
        ("global_step2", True),
    ]
    assert record["way_back"] is None


def harm(folder, how):
    """Harm a file; return its name and the bytes that must be named."""
    path = weights_file(folder, 1)
    size = path.stat().st_size
    records = json.loads((folder / "manifest.json").read_text())["files"]
    records = next(entry for entry in records if entry["name"] == path.name)["records"]
    start, nbytes = max(records, key=lambda one: one[1])[:2]
    if how == "flipped":
        flip(path, start + nbytes // 2)
        return path.name, [(start, start + nbytes)]
    if how == "cut":
        os.truncate(path, size - 100)
        return path.name, [(size - 100, size)]
    if how == "missing":
        path.unlink()
        return path.name, [(0, size)]
    if how == "headers":
        flip(path, start - 70)
        return path.name, [(None, None)]
    flip(folder / "manifest.json", 300)
    return "manifest.json", [(None, None)]


@pytest.mark.parametrize("how", ["flipped", "cut", "missing", "headers", "manifest"])
def test_verify_names_the_file_and_bytes_of_damage_and_the_way_back(two, call, how):
    name, places = harm(two / "global_step3", how)
    code, record = call("verify", two, "--json")
    assert code == 1
    (report,) = record["checkpoints"]
    assert not report["whole"]
    assert {damage["file"] for damage in report["damages"]} == {name}
    assert [(damage["start"], damage["stop"]) for damage in report["damages"]] == places
    assert record["way_back"] == "global_step2"
    code, said = call("verify", two / "global_step3")
    assert code == 1
    assert report["damages"][0]["text"] in said
    assert f'newest whole checkpoint: tag="global_step2" in {two}' in said
    assert call("verify", two, "--tag", "global_step2")[0] == 0


def test_verify_finds_all_damages_and_only_a_way_back_that_was_read(two, call):
    for tag in ("global_step2", "global_step3"):
        harm(two / tag, "flipped")
    flip(two / "global_step3" / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", 30)
    code, record = call("verify", two, "--json")
    assert code == 1
    assert len(record["checkpoints"][0]["damages"]) == 2
    assert record["way_back"] is None
    code, said = call("verify", two, "--all")
    assert code == 1
    assert re.search(r"global_step3 +damaged in 2 places", said)
    assert "newest whole checkpoint: none" in said


def test_damages_that_follow_each_other_are_one(tmp_path):
    disk = Disk()
    entry = RecordWriter(tmp_path / "file", {"x": torch.zeros(4 * BLOCK, dtype=torch.uint8)}, disk).close()
    disk.close()
    Manifest({}, files=[entry]).write(tmp_path)
    start = entry.records[0].offset
    for block in (0, 2, 3):
        flip(tmp_path / "file", start + block * BLOCK + 7)
    places = [(damage.start, damage.stop) for damage in verified(tmp_path).damages]
    assert places == [(start, start + BLOCK), (start + 2 * BLOCK, start + 4 * BLOCK)]


# -- show -----------------------------------------------------------------------------------------


def test_show_tells_of_the_run(two, call):
    code, said = call("show", two)
    assert code == 0
    for words in (
        "stage 3 on 2 ranks, bfloat16",
        "global_steps 3, micro_steps 3",
        "lr 0.0",
        "last_batch_iteration 2",
        "epoch, best",
    ):
        assert words in said
    _, record = call("show", two, "--tag", "global_step2", "--json")
    assert record["global_steps"] == 2
    assert record["client_state"] == ["epoch", "best"]
    assert record["param_groups"][0]["betas"] == [0.9, 0.95]
    assert "head.weight" in str(record)


def test_show_tells_of_every_tensor(made, call):
    truth = torch.load(made / "two" / "truth.pt")
    _, record = call("show", made / "two", "--json")
    tensors = {one["name"]: one for one in record["tensors"]}
    names = {*tensors, *(alias for one in tensors.values() for alias in one["aliases"])}
    assert names == truth.keys()
    for name, one in tensors.items():
        assert one["shape"] == list(truth[name].shape)
        trained = not name.startswith("blocks.0")
        assert one["role"] == ("trained" if trained else "frozen")
        kinds = {kind: value["dtype"] for kind, value in one["values"].items()}
        states = {"master": "float32", "exp_avg": "float32", "exp_avg_sq": "float32"} if trained else {}
        if truth[name].numel():
            assert kinds == (states if trained else {"weight": "bfloat16"})
            assert one["bytes"] == truth[name].numel() * (12 if trained else 2)
            assert one["numbers"] == ({"step": 3.0} if trained else {})
    assert {one["dtype"] for one in tensors.values()} == {"bfloat16"}
    assert tensors["embed.weight"]["aliases"] == ["head.weight"]
    _, said = call("show", made / "two", "head")
    assert re.search(r"embed.weight +\[11, 6\] +bfloat16 .*trained .*head.weight", said)
    assert "blocks" not in said


@pytest.mark.parametrize("chunk", [5, 2**22])
def test_show_s_statistics_are_those_of_torch(made, call, monkeypatch, chunk):
    monkeypatch.setattr(contents, "CHUNK", chunk)
    truth = torch.load(made / "two" / "truth.pt")
    _, record = call("show", made / "two", "blocks.*", "--stats", "--json")
    assert {one["name"].split(".")[0] for one in record["tensors"]} == {"blocks"}
    for one in record["tensors"]:
        kept = next(value for kind, value in one["values"].items() if kind in ("weight", "master"))
        stats, value = kept["stats"], truth[one["name"]].double()
        assert stats["not_finite"] == 0
        expected = value.mean(), value.std(correction=0), value.min(), value.max()
        found = [stats[name] for name in ("mean", "std", "min", "max")]
        rounding = {"rtol": 0.01, "atol": 0.001} if kept["dtype"] == "float32" else {}
        torch.testing.assert_close(
            torch.tensor(found, dtype=torch.float64), torch.stack(expected), **rounding
        )
    _, said = call("show", made / "two", "blocks.1", "--stats")
    assert re.search(r"blocks.1.1.weight +exp_avg_sq +\d", said)


def test_statistics_of_parts_are_those_of_the_whole():
    whole = torch.randn(1000, dtype=torch.float64) * 3 + 100
    stats = stats_of([whole[:1], whole[1:400], torch.tensor([float("nan"), float("inf")]), whole[400:]])
    assert stats.mean == pytest.approx(float(whole.mean()))
    assert stats.std == pytest.approx(float(whole.std(correction=0)))
    assert (stats.min, stats.max) == (float(whole.min()), float(whole.max()))
    assert stats.not_finite == 2
    for dtype in (torch.bool, torch.int64, torch.float8_e4m3fn):
        assert stats_of([torch.tensor([0.0, 1.0]).to(dtype)]).mean == 0.5
    assert stats_of([torch.tensor([1 + 3j])]).mean == 2
    assert stats_of([]).mean is None


# -- diff -----------------------------------------------------------------------------------------


def test_a_checkpoint_equals_itself_and_one_of_another_layout(made, call):
    code, said = call("diff", made / "two", made / "two" / "global_step3")
    assert code == 0
    assert "values" in said.splitlines()[-1]
    assert "are equal" in said
    code, record = call("diff", made / "two", made / "one", "--json")
    assert [
        one for one in record["values"] if one["what"] != "values" or one["largest_difference"] > 1e-4
    ] == []
    assert {one["what"] for one in record["others"]} == {"global_samples"}


def test_diff_tells_which_values_and_counters_differ(made, call):
    code, record = call("diff", made / "two" / "global_step2", made / "two" / "global_step3", "--json")
    assert code == 1
    assert not record["equal"]
    others = {one["what"]: (one["first"], one["second"]) for one in record["others"]}
    assert others["global_steps"] == (2, 3)
    assert others["lr_scheduler.last_batch_iteration"] == (1, 2)
    (steps,) = [what for what in others if what.startswith("step of")]
    assert others[steps] == (2.0, 3.0)
    names = {one["name"] for one in record["values"]}
    assert "embed.weight" in names
    assert not any(name.startswith("blocks.0") for name in names)
    code, said = call("diff", made / "two" / "global_step2", made / "two" / "global_step3")
    assert code == 1
    assert re.search(r"embed.weight +master +float32 \[11, 6\] +float32 \[11, 6\] +\S+ +\S+ %", said)


def weights(folder):
    """The weights of a checkpoint of one rank."""
    return torch.load(folder / "global_step3" / "mp_rank_00_model_states.pt", weights_only=True)["module"]


@pytest.mark.parametrize("chunk", [5, 2**22])
def test_diff_measures_differences_across_precisions(made, call, monkeypatch, chunk):
    monkeypatch.setattr(contents, "CHUNK", chunk)
    code, record = call("diff", made / "one", made / "fp32", "--json")
    assert code == 1
    mine, theirs = weights(made / "one"), weights(made / "fp32")
    found = {(one["name"], one["value"]): one for one in record["values"]}
    for name in ("blocks.0.1.weight", "blocks.1.1.weight"):
        one = found[name, "weight"]
        gaps = (mine[name].double() - theirs[name].double()).abs()
        assert one["what"] == "dtype"
        assert (one["first"]["dtype"], one["second"]["dtype"]) == ("bfloat16", "float32")
        assert one["largest_difference"] == pytest.approx(float(gaps.max()))
        assert one["differing"] == pytest.approx(float((gaps > 0).double().mean()))
    master = found["blocks.1.1.weight", "master"]
    assert master["what"] == "values"
    assert master["second"] == {"dtype": "float32", "shape": [7, 6]}


def others(folder):
    options = {"tied": True, "frozen": True, "unused": True}
    engine = make_engine(1, "bf16", model=options, optimizer=sgd)
    train(engine, [0])
    engine.save_checkpoint(folder)
    engine.destroy()


def sgd(params):
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def test_diff_tells_what_only_one_has(made, tmp_path, call):
    run_on_ranks(1, others, str(tmp_path))
    _, record = call("diff", made / "one", tmp_path, "--json")
    missing = {
        (one["name"], one["value"]): one["first"] is None
        for one in record["values"]
        if one["what"] == "missing"
    }
    assert missing["unused", "weight"]
    assert missing["embed.weight", "momentum_buffer"]
    assert not missing["embed.weight", "exp_avg"]


# -- export ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_export_writes_whole_weights(made, tmp_path, call, form, dtype):
    truth = torch.load(made / "two" / "truth.pt")
    out = tmp_path / "out"
    code, said = call("export", made / "two", out, "--format", form, "--dtype", dtype)
    assert code == 0
    (file,) = out.iterdir()
    assert str(file) in said
    found = load_file(file) if form == "safetensors" else torch.load(file, weights_only=True)
    assert found.keys() == truth.keys() - ({"head.weight"} if form == "safetensors" else set())
    for name, value in found.items():
        assert value.dtype == (torch.float32 if dtype == "fp32" else torch.bfloat16)
        torch.testing.assert_close(value.bfloat16(), truth[name], rtol=0, atol=0)


def test_export_cuts_files_where_it_is_told(made, tmp_path, call):
    code, said = call(
        "export", made / "two", tmp_path / "out", "--tag", "global_step2", "--max-shard-size", "400"
    )
    assert code == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names[-1] == "model.safetensors.index.json"
    assert len(names) > 3
    assert all(name in said for name in names)
    code, said = call("export", made / "two", tmp_path / "out", "--max_shard_size", "big")
    assert code == 2
    assert "max_shard_size: expected bytes or a size such as '5GB'" in said


def large_values(folder):
    engine = make_engine(1)
    with torch.no_grad():
        engine.module.gain.fill_(1e5)
        engine.module.head.weight.view(-1)[0] = float("inf")
    engine.save_checkpoint(folder)
    engine.destroy()


def test_export_refuses_values_that_the_dtype_does_not_hold(tmp_path, call):
    run_on_ranks(1, large_values, str(tmp_path / "kept"))
    code, said = call("export", tmp_path / "kept", tmp_path / "out", "--dtype", "fp16")
    assert code == 2
    assert "gain: 100000 is beyond what torch.float16 holds, at most 65504" in said
    assert not any((tmp_path / "out").iterdir())
    assert call("export", tmp_path / "kept", tmp_path / "out", "--dtype", "bf16")[0] == 0
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found["head.weight"].flatten()[0] == float("inf")


# -- what cannot be done --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (
            ["show", "two", "--tag", "globalstep3"],
            "no 'globalstep3' in two (did you mean 'global_step3'?); choose",
        ),
        (["show", "two/globl_step2"], "(did you mean 'global_step2'?)"),
        (
            ["show", "two", "embd.weight"],
            "no tensor has a name like 'embd.weight' (did you mean 'embed.weight'?)",
        ),
        (["verify", "two", "--all", "--tag", "x"], "not allowed with"),
        (["verify", "empty"], "empty: there is no checkpoint in it"),
        (["verify", "empty", "--all"], "empty: there is no checkpoint in it"),
        (["diff", "two", "no"], "no: there is no such folder"),
        (["diff", "two"], "DIR"),
        (["nonsense"], "invalid choice: 'nonsense'"),
        ([], "COMMAND"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(two, call, monkeypatch, args, said):
    monkeypatch.chdir(two.parent)
    (two.parent / "empty").mkdir()
    code, text = call(*args)
    assert code == 2
    assert said in text


def test_a_wrong_latest_names_the_choice(two, call):
    (two / "latest").write_text("gone")
    code, text = call("show", two)
    assert code == 2
    assert "names 'gone', which is not there; choose with --tag: global_step3, global_step2" in text
    (two / "latest").unlink()
    assert call("show", two, "--json")[1]["tag"] == "global_step3"


def test_damage_met_while_showing_or_comparing_is_an_error(two, call):
    harm(two / "global_step3", "flipped")
    for args in (["show", two, "--stats"], ["diff", two, two / "global_step2"]):
        code, text = call(*args)
        assert code == 2
        assert "are not those that were written" in text


def test_a_temporary_folder_of_a_killed_replacement_is_used(two, call):
    os.rename(two / "global_step3", two / ".global_step3.old")
    assert call("show", two, "--json")[1]["tag"] == "global_step3"
    assert call("show", two / "global_step3", "--json")[1]["global_steps"] == 3
