"""A loader that starts again when it is at its end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from deepspeed.errors import UsageError


class RepeatingLoader:
    """Iterate over `loader` for ever; every pass calls ``iter(loader)`` anew, so each epoch is reshuffled."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader
        self.data_iter: Iterator[Any] = iter(loader)

    def __iter__(self) -> RepeatingLoader:
        return self

    def __next__(self) -> Any:
        try:
            return next(self.data_iter)
        except StopIteration:
            self.data_iter = iter(self.loader)
        try:
            return next(self.data_iter)
        except StopIteration:
            raise UsageError(
                "RepeatingLoader: expected a loader that can be iterated again and yields batches, got "
                "an empty or used-up one; give it a DataLoader or a list, not a generator"
            ) from None

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]
