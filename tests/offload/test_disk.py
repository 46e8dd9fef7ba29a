"""What is written is read back, whatever sizes and addresses; what cannot be moved is an error that says why."""

import errno
import gc
import os

import pytest
import torch

from deepspeed.errors import ConfigError, OffloadError, UsageError
from deepspeed.offload.buffers import aligned_empty
from deepspeed.offload.disk import Disk, cut
from deepspeed.offload.files import DataFile


@pytest.fixture
def disk():
    made = Disk(block_size=8192, queue_depth=4)
    yield made
    made.close()


@pytest.fixture
def file(tmp_path):
    made = DataFile(tmp_path / "data")
    yield made
    made.close()


def noise(nbytes, shift=0):
    """Random bytes in memory that starts `shift` bytes after a multiple of 4096."""
    buffer = aligned_empty(nbytes + shift, torch.uint8)[shift:]
    return buffer.copy_(torch.randint(0, 256, (nbytes,), dtype=torch.uint8))


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("offset", [0, 4096, 1, 5000, 8191])
@pytest.mark.parametrize("shift", [0, 1, 904, 64])
@pytest.mark.parametrize("nbytes", [0, 1, 4095, 4096, 4097, 8192, 100_001])
def test_what_was_written_is_read_back(disk, file, nbytes, shift, offset, direct):
    if not direct:
        file._direct = None
    around, data = noise(offset + nbytes + 5000), noise(nbytes, shift)
    assert disk.write(file, 0, around).wait() == around.nbytes
    assert disk.write(file, offset, data).wait() == nbytes
    back, whole = noise(nbytes, shift), torch.empty_like(around)
    assert disk.read(file, offset, back).wait() == nbytes
    assert torch.equal(back, data)
    disk.read(file, 0, whole).wait()
    around[offset : offset + nbytes] = data
    assert torch.equal(whole, around)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_any_dtype_and_shape_is_bytes(disk, file, dtype):
    data = torch.randn(37, 41).to(dtype).requires_grad_(dtype.is_floating_point)
    back = torch.empty(37, 41, dtype=dtype)
    disk.write(file, 4096, data).wait()
    disk.read(file, 4096, back).wait()
    assert torch.equal(back, data)


def test_many_requests_at_once_do_not_mix(disk, file):
    rows = [noise(20_011) for _ in range(40)]
    for pending in [disk.write(file, 20_011 * i, row) for i, row in enumerate(rows)]:
        pending.wait()
    backs = [torch.empty_like(row) for row in rows]
    pendings = [disk.read(file, 20_011 * i, back) for i, back in enumerate(backs)]
    assert [pending.wait() for pending in pendings] == [20_011] * 40
    assert all(pending.done() for pending in pendings)
    assert all(torch.equal(back, row) for back, row in zip(backs, rows, strict=True))


@pytest.mark.parametrize("nbytes", [0, 1, 4096, 50_000])
@pytest.mark.parametrize("offset", [0, 1, 4095, 4096])
def test_pieces_cover_a_range_once_in_order_and_cut_at_blocks(offset, nbytes):
    pieces = list(cut(offset, nbytes, 8192))
    assert [n for start, end in pieces for n in range(start, end)] == list(range(nbytes))
    assert all(0 < end - start <= 8192 for start, end in pieces)
    assert all((offset + start) % 4096 == 0 for start, _ in pieces[1:])


def test_a_file_system_that_refuses_direct_transfers_gets_plain_ones(disk, file, monkeypatch):
    if not file.direct:
        pytest.skip("this file system refuses direct I/O itself")
    refused, real = file._direct, os.pwritev

    def pwritev(descriptor, buffers, offset):
        if descriptor == refused:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "pwritev", pwritev)
    data = noise(100_001)
    disk.write(file, 0, data).wait()
    assert not file.direct
    back = torch.empty_like(data)
    disk.read(file, 0, back).wait()
    assert torch.equal(back, data)


def test_calls_that_move_less_are_repeated(disk, file, monkeypatch):
    write, read = os.pwritev, os.preadv
    monkeypatch.setattr(os, "pwritev", lambda fd, parts, at: write(fd, [parts[0][:1500]], at))
    monkeypatch.setattr(os, "preadv", lambda fd, parts, at: read(fd, [parts[0][:1700]], at))
    file._direct = None
    data = noise(50_000)
    disk.write(file, 0, data).wait()
    back = torch.empty_like(data)
    assert disk.read(file, 0, back).wait() == 50_000
    assert torch.equal(back, data)


def test_reading_past_the_end_says_how_much_there_was(disk, file):
    disk.write(file, 0, noise(10_000)).wait()
    with pytest.raises(OffloadError, match=rf"read 8,192 bytes at 8192 of {file.path}: .*1,808.*10,000"):
        disk.read(file, 8192, noise(20_000)).wait()


@pytest.mark.parametrize(
    ("code", "way_out"), [(errno.EIO, "the system's log"), (errno.ENOSPC, "free some space")]
)
def test_an_error_of_the_system_is_raised_where_one_waits(disk, file, monkeypatch, code, way_out):
    def fail(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "pwritev", fail)
    pending = disk.write(file, 0, noise(100_000))
    for _ in range(2):
        with pytest.raises(OffloadError, match=rf"write .* bytes at .* of {file.path}.*{way_out}"):
            pending.wait()
    monkeypatch.undo()
    assert disk.write(file, 0, noise(100)).wait() == 100


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(OffloadError, match=f"open {tmp_path}/no/data.*create the folder"):
        DataFile(tmp_path / "no" / "data")


@pytest.mark.parametrize("name", ["block_size", "queue_depth", "threads"])
def test_settings_below_one_are_refused(name):
    with pytest.raises(ConfigError, match=f"{name}: expected at least 1, got 0"):
        Disk(**{name: 0})


def test_a_tensor_that_is_not_one_range_of_host_memory_is_refused(disk, file):
    for wrong in (torch.ones(4, 4).t()[1:], torch.ones(4, device="meta")):
        with pytest.raises(UsageError, match="contiguous tensor in host memory"):
            disk.write(file, 0, wrong)


def test_what_is_closed_takes_no_requests(file):
    disk = Disk()
    file.close()
    with pytest.raises(UsageError, match="closed"):
        disk.write(file, 0, noise(10))
    disk.close()
    disk.close()
    with pytest.raises(UsageError, match="closed"):
        disk.write(file, 0, noise(10))


def test_closing_a_file_waits_for_its_requests(disk, tmp_path):
    data = noise(2_000_000)
    file = DataFile(tmp_path / "data")
    pending = disk.write(file, 0, data)
    file.close()
    assert pending.done()
    assert (tmp_path / "data").read_bytes() == data.numpy().tobytes()


def test_what_is_closed_leaves_no_descriptor_and_no_thread(tmp_path):
    def once():
        disk, file = Disk(block_size=4096, queue_depth=4, threads=2), DataFile(tmp_path / "data")
        disk.write(file, 0, noise(100_000)).wait()
        threads = list(disk._pool._threads)
        disk.close()
        file.close()
        return len(os.listdir("/proc/self/fd")), any(one.is_alive() for one in threads)

    gc.collect()  # files of the tests before
    before, alive = once()
    assert not alive
    assert [once() for _ in range(20)] == [(before, False)] * 20


def test_a_forgotten_disk_ends_its_threads(file):
    disk = Disk(block_size=4096)
    disk.write(file, 0, noise(100_000)).wait()
    threads = list(disk._pool._threads)
    assert threads
    del disk
    for one in threads:
        one.join(10)
    assert not any(one.is_alive() for one in threads)
