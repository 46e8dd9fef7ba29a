"""The code in the README and in the guides runs as it stands."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from gpt_example import ROOT, run_script


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def run_block(code: str, folder: Path, *arguments: object) -> str:
    script = folder / "script.py"
    script.write_text(code)
    return run_script(*arguments, folder=folder, script=script)


def test_readme_example_learns(tmp_path):
    (code,) = blocks("README.md", "python")
    assert len(code.splitlines()) <= 13
    loss = float(run_block(code, tmp_path).rpartition("loss ")[2])
    assert loss < 1.0


def test_first_script_trains_and_saves(tmp_path):
    (code,), (config,) = (
        blocks("docs/getting-started.md", "python"),
        blocks("docs/getting-started.md", "json"),
    )
    json.loads(config)
    (tmp_path / "ds_config.json").write_text(config)
    run_block(code, tmp_path, "--deepspeed", "--deepspeed_config", "ds_config.json")
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("page", ["docs/migrating.md", "docs/from-fsdp.md"])
def test_the_script_for_those_who_come_from_elsewhere_runs(page, tmp_path):
    (code,) = blocks(page, "python")
    run_block(code, tmp_path)


@pytest.mark.parametrize(
    "page",
    ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))],
)
def test_links_lead_somewhere(page):
    source = ROOT / page
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", source.read_text()):
        path, _, anchor = target.partition("#")
        file = (source.parent / path) if path else source
        assert file.is_file(), f"{page} links to {target}"
        if anchor:
            titles = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
            assert anchor in {_anchor(title) for title in titles}, f"{page} links to {target}"


def _anchor(title: str) -> str:
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def test_figures_in_the_readme_stand_between_their_marks():
    text = (ROOT / "README.md").read_text()
    assert text.count("<!-- figures: begin") == text.count("<!-- figures: end -->") == 1
