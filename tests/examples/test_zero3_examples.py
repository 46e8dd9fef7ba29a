"""The examples of stage 3 from their command lines: they do what their first lines promise."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from gpt_example import EXAMPLES, ROOT, run, run_script, write_text

OVER_BUDGET = EXAMPLES / "zero3_over_budget.py"
LORA = EXAMPLES / "lora_zero3.py"
GENERATE = EXAMPLES / "generate_zero3.py"
TINY = ["--layers", 2, "--dim", 64, "--seq", 32, "--steps", 6]  # 132,000 weights: 1.5 MiB with their moments


def on_two_ranks(script: Path, *arguments: object, folder: Path, expect: int = 0) -> str:
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2"]
    return run([*launcher, str(script), *map(str, arguments)], folder=folder, expect=expect)


def losses(output: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"^step \d+/\d+  loss ([\d.]+)", output, re.MULTILINE)]


def test_over_budget_is_refused_on_one_rank_in_one_sentence(tmp_path):
    options = (*TINY, "--budget", 1, "--data", write_text(tmp_path))
    (line,) = run_script(*options, folder=tmp_path, script=OVER_BUDGET, expect=2).splitlines()
    assert re.fullmatch(
        r"[\d,]+ weights and their optimizer states take 1\.5 MiB on one rank, above the budget of 1 MiB; "
        r"use --num_gpus 2\.",
        line,
    )


def test_over_budget_trains_on_the_ranks_it_asks_for(tmp_path):
    output = on_two_ranks(OVER_BUDGET, *TINY, "--budget", 1, "--data", write_text(tmp_path), folder=tmp_path)
    curve = losses(output)
    assert curve[-1] < curve[0]
    assert "take 0.8 MiB on each of 2 ranks, within the budget of 1 MiB; at most 0." in output


def test_lora_learns_and_saves_the_adapter_whole(tmp_path):
    pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    output = on_two_ranks(LORA, "--steps", 10, folder=tmp_path)
    curve = losses(output)
    assert curve[-1] < curve[0] - 0.3
    folder = tmp_path / "runs" / "lora"
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    saved = peft.utils.load_peft_weights(str(folder), device="cpu")
    said = int(re.search(r"Saved ([\d,]+) of", output)[1].replace(",", ""))
    assert sum(value.numel() for value in saved.values()) == said
    assert all(value.any() for value in saved.values())  # trained: B starts as zeros
    assert {min(value.shape) for value in saved.values()} == {8}


def test_generating_from_shards_equals_generating_from_the_whole_model(tmp_path):
    pytest.importorskip("transformers")
    output = on_two_ranks(GENERATE, "--steps", 10, "--bytes", 20, folder=tmp_path)
    assert output.count("\nGenerate") == 1
    assert output.endswith("The whole model writes the same.\n")


@pytest.mark.parametrize(
    ("script", "missing", "needed"),
    [
        (LORA, "peft", "transformers peft"),
        (LORA, "transformers", "transformers peft"),
        (GENERATE, "transformers", "transformers"),
    ],
)
def test_a_missing_package_is_one_sentence(tmp_path, script, missing, needed):
    hide = f"import runpy, sys; sys.path.insert(0, {str(EXAMPLES)!r}); sys.modules[{missing!r}] = None; "
    code = f"{hide}runpy.run_path({str(script)!r}, run_name='__main__')"
    errors = run([sys.executable, "-c", code], folder=tmp_path, expect=1)
    assert errors == f"{script.stem}: {missing} is not installed; pip install {needed}\n"


def test_the_code_in_the_guide_runs_on_two_ranks(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "stage-3.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    script = tmp_path / "script.py"
    script.write_text("\n".join(blocks))
    output = on_two_ranks(script, folder=tmp_path)
    assert output.count("per GPU") == 1
