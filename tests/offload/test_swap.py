"""A job's folder is its own, has the space it promised, and leaves nothing behind however the job ends."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
import tempfile

import pytest
import torch

from deepspeed.errors import OffloadError
from deepspeed.offload.buffers import aligned_empty
from deepspeed.offload.disk import Disk
from deepspeed.offload.swap import SwapFolder

MIB = 2**20


@contextlib.contextmanager
def small_disk(size="8m"):
    """A file system of that size."""
    with tempfile.TemporaryDirectory() as folder:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
        if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("mounting needs to be root")
        try:
            yield folder
        finally:
            subprocess.run(["umount", folder], check=True)


JOB = """
import sys
from deepspeed.offload.swap import SwapFolder
folder = SwapFolder(sys.argv[1], rank=3)
folder.reserve(100_000)
print(folder.path, flush=True)
"""


def job(path, then="sys.stdin.read()"):
    """Start another process with a folder below `path`; return it and its folder."""
    started = subprocess.Popen(
        [sys.executable, "-c", JOB + then, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    return started, started.stdout.readline().strip()


def end(process, sign=None):
    """End a process by a signal or by the end of its input; return how it ended."""
    if sign:
        process.send_signal(sign)
    process.stdin.close()
    process.stdout.close()
    return process.wait(60)


def test_extents_start_at_blocks_and_do_not_overlap(tmp_path):
    folder = SwapFolder(tmp_path)
    extents = [folder.reserve(n) for n in (1, 4096, 4097, 0, 10_000)]
    assert [extent.offset for extent in extents] == [0, 4096, 8192, 16384, 16384]
    assert [extent.nbytes for extent in extents] == [1, 4096, 4097, 0, 10_000]
    assert all(extent.file is folder.file for extent in extents)
    folder.close()


def test_space_is_taken_when_it_is_reserved(tmp_path):
    folder = SwapFolder(tmp_path)
    folder.reserve(MIB)
    assert os.stat(folder.file.path).st_blocks * 512 >= MIB
    folder.close()


def test_freed_space_is_used_again_and_neighbours_join(tmp_path):
    folder = SwapFolder(tmp_path)
    first, second, third, _last = (folder.reserve(8192) for _ in range(4))
    for extent in (third, first, second):
        folder.free(extent)
    again = folder.reserve(24_576)
    assert again.offset == 0
    folder.free(again)
    assert [folder.reserve(4096).offset for _ in range(7)] == [0, 4096, 8192, 12288, 16384, 20480, 32768]
    folder.close()


def test_states_come_back_as_they_were(tmp_path):
    folder, disk = SwapFolder(tmp_path), Disk(block_size=8192)
    states = [torch.randn(numel) for numel in (1, 1000, 33_333)]
    extents = [folder.reserve(state.nbytes) for state in states]
    for pending in [disk.write(e.file, e.offset, s) for e, s in zip(extents, states, strict=True)]:
        pending.wait()
    for extent, state in zip(extents, states, strict=True):
        buffer = aligned_empty(state.numel(), state.dtype)
        disk.read(extent.file, extent.offset, buffer).wait()
        assert torch.equal(buffer, state)
    disk.close()
    folder.close()


def test_nothing_is_left_when_closed_or_forgotten(tmp_path):
    folder = SwapFolder(tmp_path)
    folder.reserve(5000)
    folder.close()
    folder.close()
    assert not os.listdir(tmp_path)
    forgotten = SwapFolder(tmp_path)
    forgotten.reserve(5000)
    del forgotten
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("then", ["", "raise SystemExit(3)", "1 / 0"])
def test_nothing_is_left_when_a_job_ends(tmp_path, then):
    process = subprocess.Popen(
        [sys.executable, "-c", f"{JOB}\n{then}", str(tmp_path)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    process.wait(60)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("name", ["swap", "~/swap"])
def test_a_folder_is_found_from_everywhere(tmp_path, monkeypatch, name):
    (tmp_path / "swap").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    folder = SwapFolder(name)
    assert os.listdir(tmp_path / "swap")
    monkeypatch.chdir(tmp_path / "elsewhere")
    folder.close()
    assert not os.listdir(tmp_path / "swap")


def test_what_a_killed_job_left_is_removed_at_the_next_start(tmp_path):
    process, left = job(tmp_path)
    assert end(process, signal.SIGKILL) == -signal.SIGKILL
    assert os.path.exists(left)
    folder = SwapFolder(tmp_path)
    assert [str(one) for one in folder.leftovers] == [left]
    assert os.listdir(tmp_path) == [folder.path.name]
    folder.close()


def test_a_forked_child_that_outlives_a_killed_job_does_not_keep_its_folder(tmp_path):
    process, left = job(
        tmp_path,
        "import os, time\nif os.fork():\n    sys.stdin.read()\nprint(os.getpid(), flush=True)\ntime.sleep(60)",
    )
    child = int(process.stdout.readline())
    end(process, signal.SIGKILL)
    folder = SwapFolder(tmp_path)
    assert [str(one) for one in folder.leftovers] == [left]
    folder.close()
    os.kill(child, signal.SIGKILL)


def test_a_forked_child_that_ends_removes_nothing(tmp_path):
    process, kept = job(
        tmp_path,
        "import os\nif not os.fork():\n    sys.exit()\nos.wait(); print('up', flush=True); sys.stdin.read()",
    )
    assert process.stdout.readline() == "up\n"
    other = SwapFolder(tmp_path)
    assert not other.leftovers
    assert os.path.exists(kept)
    other.close()
    assert end(process) == 0


def test_jobs_in_one_folder_do_not_meet(tmp_path):
    process, theirs = job(tmp_path)
    mine, other = SwapFolder(tmp_path, rank=3), SwapFolder(tmp_path, rank=3)
    assert len({theirs, str(mine.path), str(other.path)}) == 3
    assert not mine.leftovers + other.leftovers
    other.close()
    assert os.path.exists(theirs)
    assert mine.path.exists()
    assert end(process) == 0
    mine.close()
    assert not os.listdir(tmp_path)


def test_jobs_that_start_and_die_at_once_do_not_harm_each_other(tmp_path):
    loop = "\nfor _ in range(60):\n    one = SwapFolder(sys.argv[1]); one.reserve(9000); one.close()"
    jobs = [
        subprocess.Popen([sys.executable, "-c", JOB + loop, str(tmp_path)], stdout=subprocess.DEVNULL)
        for _ in range(3)
    ]
    assert [process.wait(100) for process in jobs] == [0, 0, 0]
    assert not os.listdir(tmp_path)


def test_a_full_disk_is_found_when_space_is_reserved():
    with small_disk() as path:
        folder = SwapFolder(path)
        folder.reserve(5 * MIB)
        with pytest.raises(OffloadError, match=r"reserve 4,194,304 bytes in .*states.*free.*choose another"):
            folder.reserve(4 * MIB)
        assert folder.file.size == 5 * MIB
        assert folder.reserve(2 * MIB).offset == 5 * MIB
        folder.close()
        assert not os.listdir(path)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch, code):
    def refuse(*_, **__):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(OffloadError, match=f"states in {tmp_path}: .*writable"):
        SwapFolder(tmp_path)


def test_a_folder_that_is_missing_is_named(tmp_path):
    with pytest.raises(OffloadError, match=f"states in {tmp_path}/no: .*create the folder"):
        SwapFolder(tmp_path / "no")


def test_a_file_in_its_place_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OffloadError, match=f"states in {tmp_path}/file: Not a directory"):
        SwapFolder(tmp_path / "file")


def test_what_else_is_in_the_folder_stays(tmp_path):
    (tmp_path / "mine").write_text("x")
    (tmp_path / "deepspeed").mkdir()
    SwapFolder(tmp_path).close()
    assert sorted(os.listdir(tmp_path)) == ["deepspeed", "mine"]


def test_nothing_is_left_when_the_file_cannot_be_made(tmp_path, monkeypatch):
    opening = os.open

    def refuse(path, *more, **named):
        if str(path).endswith("states"):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return opening(path, *more, **named)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(OffloadError, match="ulimit -n"):
        SwapFolder(tmp_path)
    monkeypatch.undo()
    assert not os.listdir(tmp_path)


def test_descriptors_do_not_grow(tmp_path):
    def once():
        folder = SwapFolder(tmp_path)
        folder.reserve(10_000)
        folder.close()
        return len(os.listdir("/proc/self/fd"))

    before = once()
    assert [once() for _ in range(20)] == [before] * 20
