"""The example of offload from its command line: what memory refuses, the disk takes."""

from __future__ import annotations

import re
import sys

import pytest
from gpt_example import EXAMPLES, ROOT, run_script, write_text

OVER_MEMORY = EXAMPLES / "offload_over_memory.py"
TINY = ["--layers", 1, "--dim", 64, "--seq", 32, "--steps", 1]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits a process's memory so")


def test_states_beyond_the_limit_are_refused_in_memory_and_train_on_disk(tmp_path):
    options = ("--steps", 3, "--data", write_text(tmp_path))
    output = run_script(*options, folder=tmp_path, script=OVER_MEMORY)
    refused, *steps, done = output.splitlines()
    assert re.fullmatch(
        r"States in memory: 192 MiB are too little; the system refused \d+ MiB more\.", refused
    )
    losses = [float(re.match(r"step \d/3  loss ([\d.]+)", step)[1]) for step in steps]
    assert losses[-1] < losses[0]
    on_disk, used = re.fullmatch(
        r"States on disk \((\d+) MiB\): trained within 192 MiB, of which (\d+) were used\.", done
    ).groups()
    assert int(used) < 192 < int(on_disk)
    assert not list((tmp_path / "runs" / "offload").iterdir())


def test_a_limit_that_refuses_nothing_is_told(tmp_path):
    options = (*TINY, "--memory", 500, "--data", write_text(tmp_path))
    errors = run_script(*options, folder=tmp_path, script=OVER_MEMORY, expect=1)
    assert errors == "500 MiB are enough without offload; choose less with --memory.\n"


def test_the_code_in_the_guide_trains_from_disk(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "offload.md").read_text(), re.DOTALL)
    script = tmp_path / "script.py"
    script.write_text(code)
    report = run_script(folder=tmp_path, script=script)
    figures = {
        name: int(n.replace(",", "")) for name, n in re.findall(r"^ +(\w[\w ]*?)  +([\d,]+) ", report, re.M)
    }
    assert figures["masters"] == 0
    assert figures["parameters"] < figures["on disk"] / 100
    assert not list((tmp_path / "swap").iterdir())
