"""The folder where a rank's states lie on disk, for as long as its job lives.

nvme_path/
  deepspeed-swap-5f0c...-rank0/     one per job and rank
    lock                            locked while the job lives
    states                          the extents of all states, one after another
  deepspeed-swap-91ab...-rank0/     another job
"""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
import uuid
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from deepspeed.common.logging import logger
from deepspeed.errors import OffloadError
from deepspeed.offload.buffers import aligned_size
from deepspeed.offload.files import DataFile, failure

PREFIX = "deepspeed-swap-"


@dataclass(frozen=True)
class Extent:
    """Bytes reserved in a file, from a multiple of 4096 on; what follows up to the next multiple is its own."""

    file: DataFile
    offset: int
    nbytes: int


class SwapFolder:
    """One rank's folder below `path`, which must exist; it goes when closed or when the interpreter ends.

    Folders that dead jobs left below `path` are removed first (note [Whose folder is it]).
    """

    def __init__(self, path: str | os.PathLike[str], rank: int = 0) -> None:
        root = (
            Path(path).expanduser().absolute()
        )  # it is to be found when the working directory is another one
        self.leftovers = _remove_leftovers(root)
        self.path, lock = _claim(root, rank)
        owner = os.getpid()
        try:
            self.file = DataFile(self.path / "states")
        except OffloadError:
            _remove(self.path, lock, None, owner)
            raise
        self._finish = weakref.finalize(self, _remove, self.path, lock, self.file, owner)
        os.register_at_fork(after_in_child=_forgetter(self._finish, lock))
        self._free: list[tuple[int, int]] = []  # offset and size, in order, no two touching
        self._end = 0
        self._changing = threading.Lock()

    def reserve(self, nbytes: int) -> Extent:
        """Return space that is there: taken from the disk now, or given back by `free` before."""
        size = aligned_size(nbytes)
        with self._changing:
            for index, (offset, room) in enumerate(self._free):
                if room >= size:
                    self._free[index : index + 1] = [(offset + size, room - size)] if room > size else []
                    return Extent(self.file, offset, nbytes)
            if size:
                self.file.allocate(self._end, size)
            self._end += size
            return Extent(self.file, self._end - size, nbytes)

    def free(self, extent: Extent) -> None:
        """Give an extent back to be reserved again."""
        size = aligned_size(extent.nbytes)
        if not size:
            return
        with self._changing:
            merged: list[tuple[int, int]] = []
            for offset, room in sorted([*self._free, (extent.offset, size)]):
                if merged and sum(merged[-1]) == offset:
                    offset, room = merged[-1][0], merged.pop()[1] + room
                merged.append((offset, room))
            self._free = merged

    def close(self) -> None:
        """Wait for what is under way and remove the folder; a second time does nothing."""
        self._finish()


# Note [Whose folder is it]
# A job holds a lock on the file ``lock`` in its folder; the system releases it when the job ends in whatever way. So
# a folder whose lock can be taken is a dead job's, and who takes it removes the folder. Between making its folder
# and locking it, a job may lose it to another one that is removing: it looks after locking whether the file it
# locked is still the one in the folder, and makes another folder if not.


def _claim(root: Path, rank: int) -> tuple[Path, int]:
    """Make a folder and lock it; return it and the lock's descriptor."""
    while True:
        folder = root / f"{PREFIX}{uuid.uuid4().hex}-rank{rank}"
        try:
            folder.mkdir(mode=0o700)
        except OSError as error:
            raise failure(f"make a folder for offloaded states in {root}", error) from error
        try:
            lock = _open_lock(folder)
        except FileNotFoundError:  # taken for a leftover and removed
            continue
        except OSError as error:
            folder.rmdir()
            raise failure(f"make a file in {folder}", error) from error
        if _locked(lock, folder, patient=True):
            return folder, lock
        os.close(lock)


def _remove_leftovers(root: Path) -> list[Path]:
    """Remove the folders of dead jobs; return them."""
    removed = []
    for folder in sorted(root.glob(f"{PREFIX}*")):
        try:
            lock = _open_lock(folder)
        except OSError:  # gone meanwhile, or another user's
            continue
        try:
            if _locked(lock, folder, patient=False):
                shutil.rmtree(folder, ignore_errors=True)
                removed.append(folder)
                logger.info(f"removed {folder}, which a job that is no more has left")
        finally:
            os.close(lock)
    return removed


def _open_lock(folder: Path) -> int:
    return os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _locked(lock: int, folder: Path, *, patient: bool) -> bool:
    """Take the lock, waiting for it if `patient`; tell whether it is ours and still the folder's."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if patient else fcntl.LOCK_NB))
        return os.path.samestat(os.fstat(lock), os.stat(folder / "lock"))
    except (BlockingIOError, FileNotFoundError):
        return False
    except OSError as error:
        raise OffloadError(
            f"cannot lock {folder}: {error.strerror}; choose a folder on a file system with locks"
        ) from error


def _remove(folder: Path, lock: int, file: DataFile | None, owner: int) -> None:
    """Remove a folder, unless this is a forked child of the process it belongs to."""
    if os.getpid() != owner:
        return
    if file is not None:
        file.close()
    shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)


def _forgetter(removal: weakref.finalize, lock: int) -> Callable[[], None]:
    """Return what a forked child calls: it closes the lock there, which would outlive a killed parent."""

    def forget() -> None:
        if removal.alive:
            os.close(lock)

    return forget
