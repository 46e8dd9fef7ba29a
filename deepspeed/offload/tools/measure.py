"""How fast a folder's disk is, under the reads and writes of this package.

|<-------------------------- nbytes of one file -------------------------->|
| request | request | ...                              one after the other; two are under way at any time
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from deepspeed.errors import OffloadError
from deepspeed.offload.buffers import aligned_empty
from deepspeed.offload.disk import Disk, Pending
from deepspeed.offload.files import DataFile
from deepspeed.offload.swap import SwapFolder

REQUEST = 64 * 2**20
"""Bytes of a request: much more than what is in flight, and little memory."""


@dataclass(frozen=True)
class Setting:
    """How a disk is asked: bytes a piece, pieces in flight a thread, threads."""

    block_size: int
    queue_depth: int
    threads: int = 1

    @property
    def in_flight(self) -> int:
        """Bytes that are asked for at once."""
        return self.block_size * self.queue_depth * self.threads

    def aio(self) -> dict[str, int]:
        """Return the `aio` section that says the same."""
        return {
            "block_size": self.block_size,
            "queue_depth": self.queue_depth,
            "intra_op_parallelism": self.threads,
        }


class Bench:
    """A file of `nbytes` in a folder of its own below `folder`; the folder goes when this is closed.

    Raises OffloadError where there is no space or no folder.
    """

    def __init__(self, folder: str, nbytes: int) -> None:
        self._swap = SwapFolder(folder)
        try:
            self._extent = self._swap.reserve(nbytes)
        except OffloadError:
            self._swap.close()
            raise
        self.nbytes = nbytes
        pattern = torch.randint(0, 256, (min(nbytes, REQUEST),), dtype=torch.uint8)
        self._buffers = [aligned_empty(len(pattern), torch.uint8) for _ in range(2)]
        self._pattern = pattern
        self._written = False

    @property
    def direct(self) -> bool:
        """Whether transfers go past the page cache."""
        return self._swap.file.direct

    def seconds(self, setting: Setting, *, write: bool, loops: int, warmup: int = 1) -> list[float]:
        """Move the whole file `loops` times, after `warmup` more, and return the seconds of each time.

        What was never written would be read without asking the disk, so a first reading writes first.
        """
        disk = Disk(setting.block_size, setting.queue_depth, setting.threads)
        try:
            if write or not self._written:
                self._fill()
            if not write and not self._written:
                self._move(disk.write)
            spent = [self._move(disk.write if write else disk.read) for _ in range(warmup + loops)]
        finally:
            disk.close()
        self._written = True
        return spent[warmup:]

    def check(self) -> None:
        """Read the file and compare it with what was written; raise OffloadError where it differs."""
        disk = Disk()
        buffer = self._buffers[0]
        try:
            for offset, nbytes in self._requests():
                disk.read(self._extent.file, offset, buffer[:nbytes]).wait()
                if not torch.equal(buffer[:nbytes], self._pattern[:nbytes]):
                    raise OffloadError(
                        f"{self._extent.file.path}: the {nbytes:,} bytes at {offset} are not those that were "
                        "written; do not trust this disk"
                    )
        finally:
            disk.close()

    def close(self) -> None:
        """Remove the file and its folder."""
        self._swap.close()

    def _fill(self) -> None:
        for buffer in self._buffers:
            buffer.copy_(self._pattern)

    def _move(self, ask: Callable[[DataFile, int, Tensor], Pending]) -> float:
        under_way: deque[Pending] = deque()
        start = time.perf_counter()
        for number, (offset, nbytes) in enumerate(self._requests()):
            if len(under_way) == len(self._buffers):
                under_way.popleft().wait()
            under_way.append(ask(self._extent.file, offset, self._buffers[number % 2][:nbytes]))
        for pending in under_way:
            pending.wait()
        return time.perf_counter() - start

    def _requests(self) -> Iterator[tuple[int, int]]:
        """Yield offset and length of each request."""
        end = self._extent.offset + self._extent.nbytes
        for offset in range(self._extent.offset, end, REQUEST):
            yield offset, min(REQUEST, end - offset)
