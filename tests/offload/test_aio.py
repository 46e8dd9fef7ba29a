"""The calls scripts make on ``aio_handle`` do what they say, for any size, and fail without leaving a file."""

import errno
import gc
import os

import pytest
import torch

import deepspeed
from deepspeed.errors import OffloadError, UsageError
from deepspeed.ops.op_builder import AsyncIOBuilder


@pytest.fixture
def handle():
    return AsyncIOBuilder().load().aio_handle(8192, 4, False, True, 2)


@pytest.fixture
def name(tmp_path):
    return str(tmp_path / "file")


SIZES = [1, 1000, 1024, 50_001]


def test_the_builder_is_where_scripts_look():
    from deepspeed.ops.aio import AsyncIOBuilder as other

    assert other is AsyncIOBuilder
    assert deepspeed.ops.__compatible_ops__[AsyncIOBuilder.NAME] is True
    assert AsyncIOBuilder().is_compatible(verbose=False)
    assert AsyncIOBuilder().absolute_name() == AsyncIOBuilder().load().__name__


def test_settings_are_what_was_given_and_have_the_known_defaults(handle):
    def settings(one):
        return [
            getattr(one, f"get_{name}")()
            for name in (
                "block_size",
                "queue_depth",
                "single_submit",
                "overlap_events",
                "intra_op_parallelism",
            )
        ]

    assert settings(handle) == [8192, 4, False, True, 2]
    assert settings(AsyncIOBuilder().load().aio_handle()) == [2**20, 128, False, False, 1]
    assert handle.get_alignment() == 4096


@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("offset", [0, 4096, 77])
def test_synchronous_calls(handle, name, numel, offset):
    data, back = torch.randn(numel), torch.zeros(numel)
    assert handle.sync_pwrite(data, name, offset) == 1
    assert handle.sync_pread(back, name, offset) == 1
    assert torch.equal(back, data)
    assert handle.wait() == 0


@pytest.mark.parametrize("numel", SIZES)
def test_asynchronous_calls_and_the_count_of_wait(handle, tmp_path, numel):
    rows = [torch.randn(numel) for _ in range(5)]
    for number, row in enumerate(rows):
        assert handle.async_pwrite(row, str(tmp_path / str(number))) == 0
    assert handle.wait() == 5
    backs = [torch.zeros(numel) for _ in rows]
    for number, back in enumerate(backs):
        assert handle.async_pread(back, str(tmp_path / str(number)), 0) == 0
    assert handle.wait() == 5
    assert handle.wait() == 0
    assert all(torch.equal(back, row) for back, row in zip(backs, rows, strict=True))
    assert (tmp_path / "0").read_bytes() == rows[0].numpy().tobytes()


@pytest.mark.parametrize("validate", [False, True])
def test_the_older_calls(handle, name, validate):
    data, back = torch.randn(3000).bfloat16(), torch.zeros(3000, dtype=torch.bfloat16)
    assert handle.write(data, name, validate) == 0
    assert handle.read(back, name, validate) == 0
    assert torch.equal(back, data)
    assert handle.pwrite(data * 2, name, validate, False) == 1
    assert handle.pread(back, name, validate, True, 0) == 0
    assert handle.wait() == 1
    assert torch.equal(back, data * 2)


def test_a_part_of_a_file_is_replaced(handle, name):
    data = torch.arange(10_000)
    handle.sync_pwrite(data, name)
    handle.sync_pwrite(torch.full((100,), -1), name, 800)
    back = torch.empty_like(data)
    handle.sync_pread(back, name)
    data[100:200] = -1
    assert torch.equal(back, data)


def test_an_open_file_can_be_given_by_its_descriptor(handle, name):
    data = torch.randn(5000)
    with open(name, "wb") as file:
        handle.async_pwrite(data, file.fileno(), 0)
        assert handle.wait() == 1
    assert torch.equal(torch.from_file(name, size=5000), data)


def test_locked_tensors(handle):
    locked = handle.new_cpu_locked_tensor(1000, torch.empty(0, dtype=torch.bfloat16))
    assert (locked.shape, locked.dtype) == ((1000,), torch.bfloat16)
    assert locked.data_ptr() % 4096 == 0
    assert handle.is_pinned(locked)
    assert handle.free_cpu_locked_tensor(locked)
    assert not handle.free_cpu_locked_tensor(locked)


def test_reading_more_than_there_is_says_so(handle, name):
    handle.sync_pwrite(torch.randn(1000), name)
    for offset in (0, 8000):
        with pytest.raises(OffloadError, match=f"of {name}: it ends"):
            handle.sync_pread(torch.empty(2000), name, offset)
    handle.async_pread(torch.empty(2000), name)
    handle.async_pread(torch.empty(10), name)
    with pytest.raises(OffloadError, match="it ends"):
        handle.wait()
    assert handle.wait() == 0


def test_reading_a_file_that_is_not_there_makes_none(handle, name):
    with pytest.raises(OffloadError, match=f"open {name}: No such file"):
        handle.sync_pread(torch.empty(10), name)
    assert not os.path.exists(name)


def test_a_write_that_fails_leaves_no_file_but_one_that_was_there(handle, name, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "old").write_text("x")
    monkeypatch.setattr(os, "pwritev", fail)
    for path in (name, str(tmp_path / "old")):
        handle.async_pwrite(torch.randn(10_000), path)
        with pytest.raises(OffloadError, match="No space left"):
            handle.wait()
    with pytest.raises(UsageError, match="contiguous"):
        handle.sync_pwrite(torch.randn(10, 10).t(), name)
    assert os.listdir(tmp_path) == ["old"]


def test_validation_finds_what_the_disk_lost(handle, name, monkeypatch):
    real = os.pwritev
    monkeypatch.setattr(
        os, "pwritev", lambda fd, parts, at: real(fd, [bytes(len(parts[0]))], at) * 0 + len(parts[0])
    )
    with pytest.raises(OffloadError, match="not those of the tensor"):
        handle.write(torch.randn(10_000), name, True)


def test_a_handle_that_is_let_go_leaves_no_descriptor_and_no_thread(name):
    def once():
        handle = AsyncIOBuilder().load().aio_handle(4096, 4)
        handle.async_pwrite(torch.randn(10_000), name)
        handle.wait()
        threads = list(handle._disk._pool._threads)
        del handle
        for one in threads:
            one.join(10)
        return len(os.listdir("/proc/self/fd")), any(one.is_alive() for one in threads)

    gc.collect()  # handles of the tests before
    before, alive = once()
    assert not alive
    assert [once() for _ in range(20)] == [(before, alive)] * 20
