"""``aio_handle``: reading and writing files under the names that scripts know, on top of `Disk`.

    from deepspeed.ops.op_builder import AsyncIOBuilder

    handle = AsyncIOBuilder().load().aio_handle(block_size=1 << 20, queue_depth=8)
    handle.async_pwrite(tensor, "file", 0)
    handle.wait()                               # 1: requests completed

Nothing is compiled: `load` returns this module.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from deepspeed.accelerator import get_accelerator
from deepspeed.errors import OffloadError, UsageError
from deepspeed.offload.buffers import ALIGNMENT, aligned_empty
from deepspeed.offload.disk import Disk, Pending
from deepspeed.offload.files import DataFile

COMPATIBLE_OPS = {"async_io": hasattr(os, "preadv")}
"""What works on this system, by the name of its builder."""


class AsyncIOBuilder:
    """Finds the module that has `aio_handle`; there is nothing to build."""

    NAME = "async_io"

    def absolute_name(self) -> str:
        """Return the module's name."""
        return __name__

    def is_compatible(self, verbose: bool = False) -> bool:
        """Tell whether this system has positioned reads and writes."""
        return COMPATIBLE_OPS[self.NAME]

    def load(self, verbose: bool = False) -> ModuleType:
        """Return the module that has `aio_handle`."""
        return sys.modules[__name__]


class aio_handle:
    """Reads and writes whole tensors from and to files, at once or in the background until `wait`.

    `single_submit` and `overlap_events` tell how requests are handed to the kernel's asynchronous interface,
    which is not used here; the numbers mean what they mean in the `aio` section.
    """

    def __init__(
        self,
        block_size: int = 2**20,
        queue_depth: int = 128,
        single_submit: bool = False,
        overlap_events: bool = False,
        intra_op_parallelism: int = 1,
    ) -> None:
        self._disk = Disk(block_size, queue_depth, intra_op_parallelism)
        self._settings = (block_size, queue_depth, single_submit, overlap_events, intra_op_parallelism)
        self._under_way: list[_Whole] = []
        self._locked: dict[int, Tensor] = {}

    def get_block_size(self) -> int:
        """Return the bytes of a piece."""
        return self._settings[0]

    def get_queue_depth(self) -> int:
        """Return how many pieces are in flight a thread."""
        return self._settings[1]

    def get_single_submit(self) -> bool:
        """Return what was given."""
        return self._settings[2]

    def get_overlap_events(self) -> bool:
        """Return what was given."""
        return self._settings[3]

    def get_intra_op_parallelism(self) -> int:
        """Return the factor of `queue_depth`."""
        return self._settings[4]

    def get_alignment(self) -> int:
        """Return the bytes that memory and offsets had best be multiples of."""
        return ALIGNMENT

    def pread(self, buffer: Tensor, filename: str, validate: bool, async_: bool, file_offset: int = 0) -> int:
        """Fill `buffer` from a file; return 1, or 0 when it goes on in the background.

        With `validate` the file is read a second time by plain calls and compared.
        """
        return self._ask(_Whole(self._disk, buffer, filename, file_offset, False, validate), async_)

    def pwrite(
        self, buffer: Tensor, filename: str, validate: bool, async_: bool, file_offset: int = 0
    ) -> int:
        """Write `buffer` to a file, which is made where there is none; return as `pread`."""
        return self._ask(_Whole(self._disk, buffer, filename, file_offset, True, validate), async_)

    def read(self, buffer: Tensor, filename: str, validate: bool, file_offset: int = 0) -> int:
        """Fill `buffer` from a file; return 0."""
        self.pread(buffer, filename, validate, False, file_offset)
        return 0

    def write(self, buffer: Tensor, filename: str, validate: bool, file_offset: int = 0) -> int:
        """Write `buffer` to a file; return 0."""
        self.pwrite(buffer, filename, validate, False, file_offset)
        return 0

    def sync_pread(self, buffer: Tensor, filename: str, file_offset: int = 0) -> int:
        """Fill `buffer` from a file."""
        return self.pread(buffer, filename, False, False, file_offset)

    def sync_pwrite(self, buffer: Tensor, filename: str, file_offset: int = 0) -> int:
        """Write `buffer` to a file."""
        return self.pwrite(buffer, filename, False, False, file_offset)

    def async_pread(self, buffer: Tensor, filename: str, file_offset: int = 0) -> int:
        """Start to fill `buffer` from a file."""
        return self.pread(buffer, filename, False, True, file_offset)

    def async_pwrite(self, buffer: Tensor, filename: str | int, file_offset: int = 0) -> int:
        """Start to write `buffer` to a file, given by its name or by a descriptor that is open."""
        name = f"/proc/self/fd/{filename}" if isinstance(filename, int) else filename
        return self.pwrite(buffer, name, False, True, file_offset)

    def wait(self) -> int:
        """Wait for all that was started; return how many requests, or raise the first OffloadError."""
        under_way, self._under_way = self._under_way, []
        failed = None
        for whole in under_way:
            try:
                whole.wait()
            except OffloadError as error:
                failed = failed or error
        if failed is not None:
            raise failed
        return len(under_way)

    def new_cpu_locked_tensor(self, num_elem: int, example_tensor: Tensor) -> Tensor:
        """Return an aligned, page-locked tensor of `num_elem` elements and the dtype of `example_tensor`."""
        made = aligned_empty(num_elem, example_tensor.dtype, pin=True)
        self._locked[made.data_ptr()] = made
        return made

    def free_cpu_locked_tensor(self, tensor: Tensor) -> bool:
        """Let go of a tensor of `new_cpu_locked_tensor`; False for any other."""
        return self._locked.pop(tensor.data_ptr(), None) is not None

    def is_pinned(self, buffer: Tensor) -> bool:
        """Tell whether `buffer` is page-locked (always true on the CPU, where it makes no difference)."""
        return get_accelerator().is_pinned(buffer)

    def _ask(self, whole: _Whole, background: bool) -> int:
        if background:
            self._under_way.append(whole)
            return 0
        whole.wait()
        return 1


class _Whole:
    """A request that opens its file and closes it again; a file it made goes when it fails."""

    def __init__(
        self, disk: Disk, buffer: Tensor, filename: str, offset: int, write: bool, validate: bool
    ) -> None:
        self._buffer, self._offset, self._write, self._validate = buffer, offset, write, validate
        self._made = write and not Path(filename).exists()
        self._file = DataFile(filename, os.O_RDWR | os.O_CREAT if write else os.O_RDONLY)
        try:
            self._pending = self._start(disk)
        except UsageError:
            self._end(failed=True)
            raise

    def wait(self) -> None:
        """Wait, close the file, and compare if asked to."""
        failed = True
        try:
            self._pending.wait()
            if self._validate:
                self._compare()
            failed = False
        finally:
            self._end(failed)

    def _start(self, disk: Disk) -> Pending:
        ask = disk.write if self._write else disk.read
        return ask(self._file, self._offset, self._buffer)

    def _end(self, failed: bool) -> None:
        self._file.close()
        if failed and self._made:
            self._file.path.unlink(missing_ok=True)

    def _compare(self) -> None:
        with open(self._file.path, "rb") as file:
            file.seek(self._offset)
            there = file.read(self._buffer.nbytes)
        if there != self._buffer.detach().reshape(-1).view(torch.uint8).numpy().tobytes():
            raise OffloadError(
                f"{self._file.path}: the {self._buffer.nbytes:,} bytes at {self._offset} are not those of the "
                "tensor; do not trust this disk"
            )
