"""Buffers are aligned at both ends and give their memory back."""

import gc

import pytest
import torch

from deepspeed.accelerator.memory import resident_bytes
from deepspeed.offload.buffers import ALIGNMENT, aligned_empty, aligned_size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8])
@pytest.mark.parametrize("numel", [0, 1, 1023, 1024, 100_003])
@pytest.mark.parametrize("pin", [False, True])
def test_memory_starts_and_ends_at_a_block(numel, dtype, pin):
    buffer = aligned_empty(numel, dtype, pin=pin)
    assert (buffer.shape, buffer.dtype) == ((numel,), dtype)
    storage = buffer.untyped_storage()
    assert storage.data_ptr() % ALIGNMENT == 0
    assert storage.nbytes() % ALIGNMENT == 0
    assert storage.nbytes() >= buffer.nbytes
    assert not buffer.any()
    buffer.fill_(3)
    assert (buffer == 3).all()


def test_sizes_are_rounded_up():
    assert [aligned_size(n) for n in (0, 1, 4096, 4097)] == [0, 4096, 4096, 8192]


def test_memory_goes_back_to_the_system():
    buffer = aligned_empty(2**26, torch.uint8).fill_(1)
    full = resident_bytes()
    view = buffer[5:]
    del buffer
    assert view[0] == 1
    del view
    gc.collect()
    assert resident_bytes() < full - 2**25
