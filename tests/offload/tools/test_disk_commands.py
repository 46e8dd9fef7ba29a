"""``ds_io`` and ``ds_nvme_tune`` measure what they are asked to, say what is wrong, and leave nothing behind."""

import json
import os

import pytest

from deepspeed.common.commands import in_words, size
from deepspeed.config import load_config
from deepspeed.errors import OffloadError
from deepspeed.offload.tools import io, tune
from deepspeed.offload.tools.measure import Bench, Setting
from deepspeed.offload.tools.sweep import Grid, Result, best, measure

SMALL = ["--io_size", "100K", "--loops", "1"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "disk").mkdir()
    return tmp_path / "disk"


def refusal(command, *args, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(list(args))
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_every_combination_is_a_row(folder, capsys):
    io.main(
        ["--folder", "disk", "--block_size", "4K", "64K", "--queue_depth", "1", "8", "--validate", *SMALL]
    )
    said = capsys.readouterr().out
    assert [line.split()[:3] for line in said.splitlines()[2:6]] == [
        [block, depth, "1"] for block in ("4K", "64K") for depth in ("1", "8")
    ]
    assert "what was read is what was written" in said
    assert not os.listdir(folder)


@pytest.mark.parametrize(("flag", "skipped"), [("--read", "write"), ("--write", "read")])
def test_one_direction_alone(capsys, flag, skipped):
    io.main(["--folder", "disk", flag, "--json", "--io_parallel", "2", *SMALL])
    (row,) = json.loads(capsys.readouterr().out)
    assert row.pop(skipped) is None
    assert row.pop({"write": "read", "read": "write"}[skipped]) > 0
    assert row.pop("direct") in (True, False)
    assert row == {"block_size": 2**20, "queue_depth": 8, "intra_op_parallelism": 2}


def test_what_is_read_was_written_before_even_without_writing_first(folder):
    bench = Bench(str(folder), 300_000)
    assert len(bench.seconds(Setting(4096, 2), write=False, loops=2, warmup=0)) == 2
    bench.check()
    bench.close()


def test_a_disk_that_loses_bytes_is_found_out(folder, monkeypatch):
    bench = Bench(str(folder), 100_000)
    bench.seconds(Setting(4096, 2), write=True, loops=1)
    path = bench._swap.file.path
    with path.open("r+b") as file:
        byte = file.read(50_000)[-1]
        file.seek(49_999)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(OffloadError, match="not those that were written"):
        bench.check()
    bench.close()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--folder", "no"], "/no: No such file or directory; create the folder"),
        ([], "--folder"),
        (["--folder", "disk", "--block_size", "x"], "expected a size such as 4096, 256K, 1M or 2G, got 'x'"),
        (["--folder", "disk", "--block_size", "0"], "got '0'"),
        (["--folder", "disk", "--io_size", "-1M"], "--io_size"),
        (["--folder", "disk", "--queue_depth", "0"], "a whole number of at least 1, got '0'"),
        (["--folder", "disk", "--warmup_loops", "-1"], "a whole number of at least 0, got '-1'"),
        (["--folder", "disk", "--read", "--write"], "not allowed with"),
        (["--folder", "disk", "--io_size", "9999999G"], "cannot reserve"),
        (["--folder", "disk", "--nonsense"], "--nonsense"),
    ],
)
def test_arguments_that_cannot_be_used_are_named(folder, capsys, wrong, said):
    assert said in refusal(io, *wrong, capsys=capsys)
    assert not os.listdir(folder)


def test_tuning_writes_a_section_a_configuration_takes(folder, capsys):
    pytest.importorskip("matplotlib")
    (folder.parent / "grid.json").write_text(
        '{"block_size": ["4K", 8192], "queue_depth": [1, 4], "io_parallel": 2}'
    )
    tune.main(["--nvme_dir", "disk", "--sweep_config", "grid.json", "--output", "best.json", *SMALL])
    section = json.loads((folder.parent / "best.json").read_text())
    aio = load_config({"train_batch_size": 1, **section}).aio
    assert aio.block_size in (4096, 8192)
    assert aio.queue_depth in (1, 4)
    assert aio.intra_op_parallelism == 2
    assert (folder.parent / "best.png").stat().st_size > 1000
    said = capsys.readouterr().out
    assert said.count("█ best") == 1
    assert json.dumps(section, indent=2) in said
    assert not os.listdir(folder)


@pytest.mark.parametrize("flag", ["--no_read", "--no_write"])
def test_tuning_by_one_direction(folder, flag):
    (folder.parent / "grid.json").write_text('{"block_size": ["4K"], "queue_depth": [1]}')
    tune.main(["--nvme_dir", "disk", "--sweep_config", "grid.json", flag, *SMALL])
    assert json.loads((folder.parent / "aio.json").read_text())["aio"]["block_size"] == 4096


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "cannot read wrong.json as JSON"),
        ("[1]", "expected an object with block_size"),
        ('{"block_sizes": [1]}', "got 'block_sizes' (did you mean 'block_size'?)"),
        ('{"block_size": ["big"]}', "block_size: expected a size such as"),
        ('{"queue_depth": [0]}', "queue_depth: expected a whole number of at least 1"),
        ('{"io_parallel": []}', "io_parallel: expected at least one value"),
    ],
)
def test_a_sweep_that_cannot_be_made_is_refused(folder, capsys, text, said):
    (folder.parent / "wrong.json").write_text(text)
    assert said in refusal(tune, "--nvme_dir", "disk", "--sweep_config", "wrong.json", capsys=capsys)


def test_tuning_nothing_or_to_nowhere_is_refused(capsys):
    assert "nothing is left" in refusal(tune, "--nvme_dir", "disk", "--no_read", "--no_write", capsys=capsys)
    said = refusal(tune, "--nvme_dir", "disk", "--output", "no/aio.json", capsys=capsys)
    assert "--output: cannot write no/aio.json" in said
    assert "no" in refusal(tune, "--nvme_dir", "no", capsys=capsys)


def test_the_best_is_the_smallest_of_the_fast():
    fast, near, slow = (
        Result(Setting(2**20, depth), write, 2e9) for depth, write in ((32, 2.0e9), (8, 1.98e9), (2, 1e9))
    )
    assert best([fast, near, slow]) is near
    assert slow.score == pytest.approx(2 / (1 / 1e9 + 1 / 2e9))
    assert Result(Setting(4096, 1), None, 3e9).score == pytest.approx(3e9)


def test_only_the_directions_asked_for_are_measured(folder):
    bench = Bench(str(folder), 10_000)
    (result,) = measure(bench, Grid([4096], [1]).settings(), ["read"], loops=1)
    assert (result.write, result.read is None) == (None, False)
    bench.close()


def test_sizes_are_read_as_they_are_written():
    for text, nbytes in (("4096", 4096), ("256K", 2**18), ("1m", 2**20), ("2G", 2**31)):
        assert size(text) == nbytes
        assert size(in_words(nbytes)) == nbytes
    assert [in_words(n) for n in (1000, 4096, 2**20, 3 * 2**30)] == ["1000", "4K", "1M", "3G"]
