"""The example from its command line: it learns, writes what it promises, and fails in one sentence."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest
from gpt_example import EXAMPLES, SCRIPT, TINY, run, run_script, write_text
from safetensors.torch import load_file

CONFIG = EXAMPLES / "ds_config.json"


def train(folder: Path, *arguments: object) -> str:
    text = write_text(folder)
    return run_script(
        "--deepspeed",
        "--deepspeed_config",
        CONFIG,
        "--data",
        text,
        *TINY,
        "--steps",
        20,
        *arguments,
        folder=folder,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, str]:
    """The folder of a run of 20 tiny steps, and what the run printed."""
    folder = tmp_path_factory.mktemp("gpt")
    return folder, train(folder)


def result_in(folder: Path) -> dict:
    return json.loads((folder / "runs" / "gpt" / "result.json").read_text())


def test_loss_falls(trained):
    curve = result_in(trained[0])["train"]
    assert [step for step, _ in curve] == list(range(1, 21))
    assert curve[0][1] > 7
    assert curve[-1][1] < curve[0][1] - 2


def test_it_is_scored_beside_the_counting_models(trained):
    folder, output = trained
    result = result_in(folder)
    assert [step for step, _ in result["validation"]] == [4, 8, 12, 16, 20]
    for bits in (result["order0"], result["order1"], result["validation"][-1][1]):
        assert f"{bits:5.2f}" in output


def test_it_writes_weights_sizes_and_a_picture(trained):
    folder = trained[0] / "runs" / "gpt"
    assert sorted(path.name for path in folder.iterdir()) == [
        "loss.png",
        "model.json",
        "model.safetensors",
        "result.json",
    ]
    assert load_file(folder / "model.safetensors")["head.weight"].shape == (256, 32)
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_it_shows_plain_lines_without_a_terminal(trained):
    lines = [line for line in trained[1].splitlines() if line.startswith("step ")]
    assert lines[-1].startswith("step 20/20  loss ")
    for column in ("bits/byte", "lr", "grad norm", "tokens/s", "MB per rank", "left"):
        assert f"  {column} " in lines[0]
    assert "\x1b" not in trained[1]


def test_the_command_it_prints_continues(trained):
    folder, output = trained
    (line,) = [line for line in output.splitlines() if line.startswith("Continue:")]
    arguments = shlex.split(line)[3:]
    run_script(*arguments, "--sample-bytes", "16", folder=folder)
    before = result_in(folder)["train"][0][1]
    after = json.loads((folder / "runs" / "gpt-2" / "result.json").read_text())["train"][0][1]
    assert after < before - 2


def test_sampling_can_be_repeated(trained):
    folder = trained[0]
    arguments = ("runs/gpt", "--prompt", "the ", "--bytes", 10)
    first, again = (
        run_script(*arguments, folder=folder, script=EXAMPLES / "sample_gpt.py") for _ in range(2)
    )
    assert first == again
    assert first.startswith("the ")


def test_it_stops_when_the_time_is_up_and_still_finishes(tmp_path):
    output = run_script("--data", write_text(tmp_path), *TINY, "--minutes", 1e-6, folder=tmp_path)
    assert "Stopped at step 1 of 800; --minutes gives it more time." in output
    result = result_in(tmp_path)
    assert [step for step, _ in result["train"]] == [step for step, _ in result["validation"]] == [1]


def test_without_a_configuration_it_takes_the_one_beside_it(tmp_path):
    run_script("--data", write_text(tmp_path), *TINY, "--steps", 1, folder=tmp_path)


def test_two_ranks_through_the_launcher(tmp_path):
    command = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", str(SCRIPT)]
    options = ["--deepspeed", "--deepspeed_config", str(CONFIG), *TINY, "--steps", "4"]
    output = run([*command, *options, "--data", str(write_text(tmp_path))], folder=tmp_path)
    assert output.count("step 4/4") == 1
    assert "2 cpu ranks" in output
    assert "deepspeed --num_gpus 2" in output


def say(problem: str) -> str:
    return f"pretrain_gpt: {problem}"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--data", "missing"], "--data: missing does not exist; give a file or a folder of text files"),
        (["--steps", "-1"], "--steps: expected a number above 0, got -1"),
        (["--dim", "130"], "--dim: expected a multiple of twice --heads (4), got 130; change one of them"),
        (["--output", "blocked"], "--output: blocked cannot be made: File exists"),
    ],
)
def test_what_cannot_be_used_is_one_sentence_and_code_2(tmp_path, arguments, problem):
    (tmp_path / "blocked").write_text("a file")
    assert run_script(*arguments, folder=tmp_path, expect=2).splitlines() == [say(problem)]


def test_a_wrong_configuration_is_one_sentence_and_code_2(tmp_path):
    (tmp_path / "c.json").write_text(
        '{"train_batch_size": 8, "optimizer": {"type": "Adam"}, "zero_optimization": {"stage": 4}}'
    )
    arguments = ("--data", write_text(tmp_path), *TINY, "--deepspeed_config", "c.json")
    (line,) = run_script(*arguments, folder=tmp_path, expect=2).splitlines()
    assert line.startswith(say("zero_optimization.stage: expected 0, 1, 2 or 3, got 4"))


def test_two_ranks_say_it_once(tmp_path):
    command = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", str(SCRIPT)]
    errors = run([*command, "--data", "missing"], folder=tmp_path, expect=2)
    assert errors.count("--data: missing does not exist") == 1
    assert "Traceback" not in errors
