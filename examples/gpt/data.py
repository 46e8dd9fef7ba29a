"""Text as bytes: find the files, split them into training and validation, cut windows.

files --shuffled by a fixed seed--> [ validation files | training files ] --joined--> two byte arrays
window i of an array:  tokens  = bytes[i * seq     : i * seq + seq]
                       targets = bytes[i * seq + 1 : i * seq + seq + 1]
"""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from gpt.errors import UserError

SPLIT_SEED = 20
VALIDATION_SHARE = 0.05
VALIDATION_LIMIT = 128 * 1024  # bytes that are scored, from all over the validation files
NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data"}

Document = tuple[str, bytes]  # where it came from, its bytes


@dataclass(frozen=True)
class Corpus:
    """Training and validation bytes (uint8, one dimension each) and where they came from."""

    train: np.ndarray
    validation: np.ndarray
    train_names: tuple[str, ...]
    validation_names: tuple[str, ...]


class Windows(Dataset):
    """Windows of `seq` bytes, in an order that `seed` decides; the targets are one byte further on."""

    def __init__(self, data: np.ndarray, seq: int, seed: int = 0) -> None:
        self.data = torch.from_numpy(data)
        self.seq = seq
        self.order = np.random.default_rng(seed).permutation((len(data) - 1) // seq)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return tokens and targets, int64, `seq` long each."""
        start = int(self.order[index]) * self.seq
        window = self.data[start : start + self.seq + 1].long()
        return window[:-1], window[1:]


def load_corpus(paths: Sequence[str], seq: int) -> Corpus:
    """Read `paths` (files or folders; none means Python's own text), split them, check that they suffice."""
    documents = read_paths(paths) if paths else python_text()
    validation, train = split(documents)
    corpus = Corpus(_join(train), _join(validation), _names(train), _names(validation))
    for part, data in (("training", corpus.train), ("validation", corpus.validation)):
        if len(data) <= seq:
            raise UserError(
                f"--data: the {part} text has {len(data):,} bytes, one sequence needs {seq + 1:,}; "
                "give more text or a smaller --seq"
            )
    return corpus


def python_text() -> list[Document]:
    """Return the sources of the standard library and the language reference that `help()` shows."""
    from pydoc_data.topics import topics

    library = Path(sysconfig.get_path("stdlib"))
    sources = [
        path for path in sorted(library.rglob("*.py")) if not NOT_LIBRARY & {*path.relative_to(library).parts}
    ]
    documents = [(str(path), path.read_bytes()) for path in sources]
    documents += [(f"help({name!r})", text.encode()) for name, text in sorted(topics.items())]
    documents = [document for document in documents if document[1]]
    if not documents:
        raise UserError(f"no library sources under {library}; give your own text with --data FILE_OR_FOLDER")
    return documents


def read_paths(paths: Sequence[str]) -> list[Document]:
    """Read every file given and every file in the folders given, hidden ones left out."""
    documents: list[Document] = []
    if not all(paths):
        raise UserError("--data: expected a file or a folder of text files, got an empty name")
    for path in map(Path, paths):
        if path.is_dir():
            documents += _read_folder(path)
        elif path.is_file():
            documents.append((str(path), _read_file(path)))
        elif path.exists():
            raise UserError(
                f"--data: {path} is neither a file nor a folder; give a file or a folder of text files"
            )
        else:
            raise UserError(f"--data: {path} does not exist; give a file or a folder of text files")
    return list(dict(documents).items())  # a file named twice counts once


def _read_folder(folder: Path) -> list[Document]:
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    documents = [(str(path), _read_file(path)) for path in files if path.stat().st_size]
    if not documents:
        raise UserError(f"--data: the folder {folder} holds no file with text in it")
    return documents


def _read_file(path: Path) -> bytes:
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UserError(f"--data: {path} cannot be read: {error.strerror}") from error
    if not text:
        raise UserError(f"--data: {path} is empty; give a file with text in it")
    return text


def split(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """Return (validation, training): whole files, in an order that never changes; one file alone is cut."""
    if len(documents) == 1:
        return _cut_one(documents[0])
    shuffled = sorted(documents)
    random.Random(SPLIT_SEED).shuffle(shuffled)
    wanted = VALIDATION_SHARE * sum(len(text) for _, text in shuffled)
    validation: list[Document] = []
    while sum(len(text) for _, text in validation) < wanted and len(shuffled) > 1:
        validation.append(shuffled.pop())
    return validation, shuffled


def _cut_one(document: Document) -> tuple[list[Document], list[Document]]:
    name, text = document
    cut = len(text) - max(1, round(2 * VALIDATION_SHARE * len(text)))
    return [(f"{name} (its end)", text[cut:])], [(name, text[:cut])]


def validation_windows(data: np.ndarray, seq: int) -> np.ndarray:
    """Return what is scored: windows spread evenly over `data`, (windows, seq + 1), uint8.

    The first byte of a window is context only, the other `seq` are predicted.
    """
    available = (len(data) - 1) // seq
    wanted = min(available, max(1, VALIDATION_LIMIT // seq))
    starts = np.arange(wanted) * available // wanted * seq
    windows: np.ndarray = data[starts[:, None] + np.arange(seq + 1)]
    return windows


def _join(documents: Sequence[Document]) -> np.ndarray:
    return np.frombuffer(bytearray(b"".join(text for _, text in documents)), dtype=np.uint8)


def _names(documents: Sequence[Document]) -> tuple[str, ...]:
    return tuple(name for name, _ in documents)
