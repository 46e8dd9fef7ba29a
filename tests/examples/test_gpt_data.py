"""The text of the example: found, split by file, cut into windows."""

from __future__ import annotations

from pathlib import Path

import gpt_example  # noqa: F401
import numpy as np
import pytest
import torch
from gpt.data import Windows, load_corpus, python_text, read_paths, split, validation_windows
from gpt.errors import UserError


def documents(count: int = 40) -> list[tuple[str, bytes]]:
    return [(f"file{number}", bytes([number % 256]) * (10 + number)) for number in range(count)]


def test_split_is_disjoint_and_complete():
    validation, train = split(documents())
    assert sorted(validation + train) == sorted(documents())
    assert not set(validation) & set(train)
    assert validation
    assert train


def test_split_is_the_same_in_any_order():
    assert split(documents()) == split(documents()[::-1])


def test_split_gives_about_a_twentieth_of_the_bytes_to_validation():
    validation, train = split(documents(400))
    share = sum(len(text) for _, text in validation) / sum(len(text) for _, text in validation + train)
    assert 0.05 <= share < 0.06


def test_two_files_are_one_for_each_part():
    validation, train = split([("a", b"x" * 99), ("b", b"y")])
    assert len(validation) == len(train) == 1


def test_a_single_file_is_cut_near_its_end():
    text = bytes(range(200))
    ((_, ends),), ((_, begins),) = split([("book", text)])
    assert begins + ends == text
    assert len(ends) == 20


def test_windows_hold_each_byte_once_and_targets_are_one_further():
    data = np.arange(101, dtype=np.uint8)
    windows = Windows(data, seq=10, seed=3)
    assert len(windows) == 10
    tokens = torch.cat([windows[index][0] for index in range(10)])
    assert tokens.sort().values.tolist() == list(range(100))
    assert all((targets - tokens == 1).all() for tokens, targets in (windows[index] for index in range(10)))


def test_the_seed_decides_the_order():
    data = np.arange(101, dtype=np.uint8)

    def order(seed: int) -> list[int]:
        return [int(tokens[0]) for tokens, _ in (Windows(data, 10, seed)[index] for index in range(10))]

    assert order(0) == order(0)
    assert order(0) != order(1)


def test_validation_windows_spread_over_the_whole_text(monkeypatch):
    monkeypatch.setattr("gpt.data.VALIDATION_LIMIT", 40)
    windows = validation_windows(np.arange(201, dtype=np.uint8), seq=10)
    assert windows.shape == (4, 11)
    assert windows[:, 0].tolist() == [0, 50, 100, 150]


def test_a_short_text_gives_the_windows_it_has():
    assert validation_windows(np.arange(25, dtype=np.uint8), seq=10).shape == (2, 11)


def test_folders_are_read_without_hidden_files_and_twice_named_files_count_once(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one")
    (tmp_path / ".secret").write_bytes(b"no")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b").write_bytes(b"two")
    found = read_paths([str(tmp_path), str(tmp_path / "a.txt")])
    assert sorted(text for _, text in found) == [b"one", b"two"]


def test_pythons_own_text_is_there():
    found = python_text()
    names = [name for name, _ in found]
    assert "help('FLOAT')" in names or any(name.startswith("help(") for name in names)
    assert any(Path(name).name == "json" or name.endswith("argparse.py") for name in names)
    assert not any("site-packages" in name for name in names)


def make_empty(folder: Path) -> Path:
    (folder / "empty").touch()
    return folder / "empty"


def make_short(folder: Path) -> Path:
    (folder / "short").write_bytes(b"x" * 100)
    return folder / "short"


def make_folder_without_text(folder: Path) -> Path:
    (folder / "nothing").mkdir()
    return folder / "nothing"


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda folder: folder / "missing", "does not exist; give a file or a folder"),
        (lambda folder: "", "expected a file or a folder of text files, got an empty name"),
        (lambda folder: "/dev/null", "is neither a file nor a folder"),
        (make_empty, "is empty; give a file with text in it"),
        (make_folder_without_text, "holds no file with text in it"),
        (make_short, "text has 90 bytes, one sequence needs 257; give more text or a smaller --seq"),
    ],
)
def test_unusable_text_is_named_in_one_sentence(tmp_path, make, sentence):
    with pytest.raises(UserError, match=sentence) as raised:
        load_corpus([str(make(tmp_path))], seq=256)
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith("--data: ")
