"""The code in the guide to simulation runs as it stands there, and says what a rank of 512 keeps and sends."""

from __future__ import annotations

import re
import sys

from gpt_example import ROOT, run


def test_the_code_in_the_guide_simulates_a_rank_of_512(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "simulation.md").read_text(), re.DOTALL)
    script = tmp_path / "simulate.py"
    script.write_text(code)

    output = run([sys.executable, str(script)], folder=tmp_path)

    weights = 80 * (8192 * 8192 + 8192)
    persistent = [int(one.replace(",", "")) for one in re.findall(r"persistent\s+([\d,]+)", output)]
    assert 14 * weights / 512 < persistent[1] < 1.01 * 14 * weights / 512
    assert re.search(r"reduce_scatter_single\s+128\.00 MB\s+80 ", output)
