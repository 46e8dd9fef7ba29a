"""A file whose bytes go past the page cache where the file system can do that, and through it elsewhere."""

from __future__ import annotations

import errno
import os
import shutil
from concurrent.futures import Future, wait
from pathlib import Path

from deepspeed.errors import OffloadError, UsageError
from deepspeed.offload.buffers import ALIGNMENT

ANOTHER_FOLDER = "choose another folder"
WAY_OUT = {
    errno.ENOSPC: f"free some space or {ANOTHER_FOLDER}",
    errno.EDQUOT: f"raise the quota or {ANOTHER_FOLDER}",
    errno.EFBIG: f"raise the limit on file sizes (ulimit -f) or {ANOTHER_FOLDER}",
    errno.EIO: "the disk reports a fault: look into the system's log, and " + ANOTHER_FOLDER,
    errno.ENOENT: "create the folder, or mount the disk it is on",
    errno.EACCES: f"make it writable for this user or {ANOTHER_FOLDER}",
    errno.EPERM: f"make it writable for this user or {ANOTHER_FOLDER}",
    errno.EROFS: f"mount the disk writable or {ANOTHER_FOLDER}",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
}


def failure(what: str, error: OSError) -> OffloadError:
    """Put an error of the system into a sentence: what failed, why, the way out."""
    way_out = WAY_OUT.get(error.errno or 0, ANOTHER_FOLDER)
    return OffloadError(f"cannot {what}: {error.strerror or error}; {way_out}")


class DataFile:
    """A file open for transfers of `Disk`.

    Note [Two descriptors]: direct I/O moves whole blocks from aligned memory. What is left, the ends of a
    range that are no whole block, goes through the page cache by a second descriptor. The kernel keeps the two
    coherent page by page, so transfers of different blocks may run at once, and nobody reads a block to
    change a part of it. A file system refuses direct I/O when the file is opened, or some only when it is
    tried; then the plain descriptor serves everything.
    """

    def __init__(self, path: str | os.PathLike[str], flags: int = os.O_RDWR | os.O_CREAT) -> None:
        self.path = Path(path)
        self.requests: set[Future[int]] = set()  # under way
        try:
            self._plain = os.open(path, flags | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise failure(f"open {path}", error) from error
        self._descriptors = [self._plain]
        self._direct = self._open_direct(flags & os.O_ACCMODE)

    @property
    def direct(self) -> bool:
        """Whether whole blocks go past the page cache."""
        return self._direct is not None

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return os.fstat(self._plain).st_size

    def allocate(self, offset: int, nbytes: int) -> None:
        """Take space on the disk for a range at the end of the file, and all of it or none."""
        try:
            os.posix_fallocate(self._plain, offset, nbytes)
        except OSError as error:
            os.ftruncate(self._plain, offset)
            free = shutil.disk_usage(self.path.parent).free
            what = (
                f"reserve {nbytes:,} bytes in {self.path} beside {offset:,} there, with {free:,} bytes free"
            )
            raise failure(what, error) from error

    def transfer(self, write: bool, memory: memoryview, address: int, offset: int) -> None:
        """Move all bytes of `memory`, which is at `address`, to or from `offset`; OffloadError if that cannot be."""
        done, nbytes = 0, len(memory)
        try:
            while done < nbytes:
                moved = self._some(write, memory[done:], address + done, offset + done)
                if not moved:
                    raise self._short(nbytes, done, offset)
                done += moved
        except OSError as error:
            verb, where = "write" if write else "read", f"at {offset} of {self.path}"
            raise failure(f"{verb} {nbytes:,} bytes {where}, {done:,} done", error) from error

    def sync(self) -> None:
        """Wait until all that was written is on the disk."""
        try:
            os.fsync(self._plain)
        except OSError as error:
            raise failure(f"write {self.path}", error) from error

    def close(self) -> None:
        """Wait for what is under way and close; a second time does nothing."""
        wait(list(self.requests))
        descriptors, self._descriptors = self._descriptors, []
        for descriptor in descriptors:
            os.close(descriptor)

    def check_open(self) -> None:
        """Raise UsageError once closed: its descriptors may be other files by now."""
        if not self._descriptors:
            raise UsageError(f"{self.path}: closed; it takes no more requests")

    def _open_direct(self, access: int) -> int | None:
        if not hasattr(os, "O_DIRECT"):
            return None
        try:
            direct = os.open(self.path, access | os.O_DIRECT | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENOTSUP):
                return None
            self.close()
            raise failure(f"open {self.path}", error) from error
        self._descriptors.append(direct)
        os.posix_fadvise(self._plain, 0, 0, os.POSIX_FADV_RANDOM)  # ends only: no reading ahead of them
        return direct

    def _some(self, write: bool, memory: memoryview, address: int, offset: int) -> int:
        """Make one system call; return the bytes it moved."""
        call = os.pwritev if write else os.preadv
        whole_blocks = not (address | offset | len(memory)) % ALIGNMENT
        if self._direct is not None and whole_blocks:
            try:
                return call(self._direct, [memory], offset)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._direct = None
        return call(self._plain, [memory], offset)

    def _short(self, wanted: int, got: int, offset: int) -> OffloadError:
        return OffloadError(
            f"cannot read {wanted:,} bytes at {offset} of {self.path}: it ends after {got:,} of them, at "
            f"{self.size:,} bytes; read what was written, or write it first"
        )
