"""Reading and writing tensors while the caller computes: a thread pool of direct I/O.

    read(file, offset, buffer)      |<-------------- the range in the file -------------->|
    pieces                          | end |  block  |  block  |  block  |  block  |  end  |

A request is cut where blocks begin in the file. Up to `queue_depth` x `threads` pieces are in flight, a worker
each; a worker takes the next piece of the oldest request that has one left.
"""

from __future__ import annotations

import ctypes
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deepspeed.errors import ConfigError, UsageError
from deepspeed.offload.buffers import ALIGNMENT, aligned_empty, aligned_size
from deepspeed.offload.files import DataFile

MOST_WORKERS = 64

Piece = tuple[int, int]
"""Start and end, in bytes of the buffer."""


@dataclass
class Request:
    """What to move, the pieces that no worker has taken, and the workers that have not left."""

    file: DataFile
    offset: int
    buffer: Tensor | None
    array: np.ndarray
    write: bool
    pieces: deque[Piece]
    workers: deque[int]
    address: int

    def leave(self) -> None:
        """Let go of the memory with the last worker: who waits may be counting who shares it."""
        self.workers.pop()
        if not self.workers:
            self.buffer = None


class Pending:
    """A request under way; its buffer belongs to it until `wait` returns."""

    def __init__(self, nbytes: int, parts: list[Future[int]]) -> None:
        self.nbytes = nbytes
        self._parts = parts

    def done(self) -> bool:
        """Tell whether `wait` would return at once."""
        return all(part.done() for part in self._parts)

    def wait(self) -> int:
        """Wait until no worker touches the buffer any more; return the bytes moved or raise OffloadError."""
        wait(self._parts)
        return sum(part.result() for part in self._parts)


class Disk:
    """A small pool of threads that moves tensors from and to files.

    `block_size` (bytes, rounded up to a multiple of 4096), `queue_depth` and `threads` are those of the `aio`
    section; no more than 64 pieces are in flight.
    """

    def __init__(self, block_size: int = 2**20, queue_depth: int = 8, threads: int = 1) -> None:
        for name, value in (("block_size", block_size), ("queue_depth", queue_depth), ("threads", threads)):
            if value < 1:
                raise ConfigError(f"{name}: expected at least 1, got {value}")
        self.block_size = aligned_size(block_size)
        self.workers = min(queue_depth * threads, MOST_WORKERS)
        self._pool = ThreadPoolExecutor(self.workers, thread_name_prefix="deepspeed-disk")
        self._own = threading.local()
        self._closed = False

    def read(self, file: DataFile, offset: int, buffer: Tensor) -> Pending:
        """Start to fill `buffer`, a contiguous host tensor, from byte `offset` of `file`."""
        return self._start(file, offset, buffer, write=False)

    def write(self, file: DataFile, offset: int, buffer: Tensor) -> Pending:
        """Start to write `buffer`, a contiguous host tensor, at byte `offset` of `file`."""
        return self._start(file, offset, buffer, write=True)

    def write_here(self, file: DataFile, offset: int, buffer: Tensor) -> None:
        """Write in the calling thread: when Python is about to end, no pool takes requests any more."""
        self._move_all(self._request(file, offset, buffer, write=True))

    def read_here(self, file: DataFile, offset: int, buffer: Tensor) -> None:
        """Read in the calling thread; see `write_here`."""
        self._move_all(self._request(file, offset, buffer, write=False))

    def _move_all(self, request: Request) -> None:
        for start, end in request.pieces:
            self._move(request, start, end)

    def close(self) -> None:
        """Finish what was asked for and end the threads; a second time does nothing."""
        self._closed = True
        self._pool.shutdown()

    def _start(self, file: DataFile, offset: int, buffer: Tensor, *, write: bool) -> Pending:
        if self._closed:
            raise UsageError("Disk: closed; it takes no more requests")
        request = self._request(file, offset, buffer, write=write)
        nbytes = len(request.array)
        parts = [self._pool.submit(self._serve, request) for _ in range(len(request.workers))]
        for part in parts:
            file.requests.add(part)
            part.add_done_callback(file.requests.discard)
        return Pending(nbytes, parts)

    def _request(self, file: DataFile, offset: int, buffer: Tensor, *, write: bool) -> Request:
        file.check_open()
        array = bytes_of(buffer)
        pieces = deque(cut(offset, len(array), self.block_size))
        workers = deque(range(min(self.workers, len(pieces))))
        return Request(file, offset, buffer, array, write, pieces, workers, buffer.data_ptr())

    def _serve(self, request: Request) -> int:
        """In a worker: move pieces until none is left; return the bytes moved."""
        moved = 0
        try:
            while request.pieces:
                start, end = request.pieces.popleft()
                self._move(request, start, end)
                moved += end - start
        except IndexError:  # another worker took the last one
            pass
        except BaseException:
            request.pieces.clear()  # the request has failed; the other workers need not go on
            raise
        finally:
            request.leave()
        return moved

    def _move(self, request: Request, start: int, end: int) -> None:
        file, offset, address = request.file, request.offset + start, request.address + start
        if file.direct and address % ALIGNMENT and not (offset | (end - start)) % ALIGNMENT:
            self._bounce(request, start, end)
        else:
            file.transfer(request.write, request.array.data[start:end], address, offset)

    def _bounce(self, request: Request, start: int, end: int) -> None:
        """Move a whole block between unaligned memory and the disk by way of this worker's aligned one."""
        if not hasattr(self._own, "block"):
            self._own.block = aligned_empty(self.block_size, torch.uint8).numpy()
        block: np.ndarray = self._own.block[: end - start]
        if request.write:
            block[:] = request.array[start:end]
        request.file.transfer(request.write, block.data, block.ctypes.data, request.offset + start)
        if not request.write:
            request.array[start:end] = block


def cut(offset: int, nbytes: int, block_size: int) -> Iterator[Piece]:
    """Cut `nbytes` bytes that lie at `offset` of a file: whole blocks, and what is left at the ends."""
    start, end = 0, min(-offset % ALIGNMENT, nbytes)
    whole = end + (nbytes - end) // ALIGNMENT * ALIGNMENT
    while start < nbytes:
        if end > start:
            yield start, end
        start, end = end, min(end + block_size, whole) if end < whole else nbytes


def bytes_of(buffer: Tensor) -> np.ndarray:
    """Return the bytes of a contiguous host tensor, not copied (UsageError if it is none)."""
    if buffer.device.type != "cpu" or not buffer.is_contiguous():
        raise UsageError(
            f"Disk: expected a contiguous tensor in host memory, got shape {tuple(buffer.shape)} with strides "
            f"{buffer.stride()} on {buffer.device}; copy it into one first"
        )
    nbytes = buffer.numel() * buffer.element_size()
    if nbytes == 0:
        return np.empty(0, dtype=np.uint8)
    # Not Tensor.numpy(): memory that it has seen can never be resized again.
    memory = memoryview((ctypes.c_char * nbytes).from_address(buffer.data_ptr()))
    return np.frombuffer(memory, dtype=np.uint8)
