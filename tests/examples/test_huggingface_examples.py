"""The examples with the Trainer and Accelerate from their command lines: they do what their first lines promise."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import transformers
from gpt_example import EXAMPLES, run

LAUNCH = ["launch", "--use_deepspeed", "--num_processes", "2", "--num_machines", "1"]
LAUNCH += ["--dynamo_backend", "no", "--mixed_precision", "no"]


def launched(script, *arguments, folder, launch=()):
    accelerate = str(Path(sys.executable).with_name("accelerate"))
    return run([accelerate, *LAUNCH, *launch, str(EXAMPLES / script), *arguments], folder=folder)


def test_the_trainer_learns_and_saves_a_model_for_from_pretrained(tmp_path):
    output = launched("finetune_trainer.py", "--steps", "12", folder=tmp_path)
    assert float(re.search(r"([\d.]+) bits per byte", output)[1]) < 7  # 8 without training
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "runs" / "trainer")
    assert all(param.numel() for param in model.parameters())


def test_a_loop_with_accelerate_stops_resumes_and_saves(tmp_path):
    launch = ["--zero_stage", "3"]
    output = launched("finetune_accelerate.py", "--steps", "20", folder=tmp_path, launch=launch)
    first, *_, last = (float(loss) for loss in re.findall(r"loss ([\d.]+)", output))
    assert last < first - 0.5
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "runs" / "accelerate")
    assert all(param.numel() for param in model.parameters())
