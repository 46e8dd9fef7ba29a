"""Blocks of a checkpoint are read ahead, and checked one by one."""

from __future__ import annotations

import pytest
import torch

from deepspeed.checkpoint.records import BLOCK, BLOCKS_AHEAD, BlockSource, RecordReader, RecordWriter
from deepspeed.errors import CheckpointError
from deepspeed.offload.disk import Disk


def written(path, values):
    disk = Disk()
    entry = RecordWriter(path, {"values": values}, disk).close()
    disk.close()
    return entry


@pytest.mark.parametrize("here", [False, True])
def test_any_number_of_ranges_may_be_asked_for_at_a_time(tmp_path, here):
    torch.manual_seed(0)
    whole = [torch.randn(BLOCK // 4 * 3 + 5), *(torch.randn(1000) for _ in range(3 * BLOCKS_AHEAD))]
    source = BlockSource(here=here)
    reader = RecordReader(tmp_path / "file.pt", written(tmp_path / "file.pt", whole), source)
    got = []
    for index, value in enumerate(whole):
        for start, stop in ((0, value.numel()), (7, value.numel() - 9)):
            got.append((value[start:stop].bfloat16(), torch.empty(stop - start, dtype=torch.bfloat16)))
            reader.ask(index, torch.float32, start, got[-1][1])
    source.settle()
    for expected, out in got:
        assert torch.equal(expected, out)
    source.close()


def test_after_a_damaged_block_those_behind_it_are_not_taken_and_others_can_be_read(tmp_path):
    values = [torch.full((5000,), float(number)) for number in range(3)]
    entry = written(tmp_path / "file.pt", values)
    with open(tmp_path / "file.pt", "r+b") as file:
        file.seek(entry.records[1].offset)
        file.write(b"x")
    source = BlockSource()
    reader = RecordReader(tmp_path / "file.pt", entry, source)
    outs = [torch.full((5000,), -1.0) for _ in values]
    for index, out in enumerate(outs):
        reader.ask(index, torch.float32, 0, out)
    with pytest.raises(CheckpointError, match="damaged"):
        source.settle()
    assert [out[0].item() for out in outs] == [0, -1, -1]
    reader.ask(2, torch.float32, 0, outs[2])
    source.settle()
    assert torch.equal(outs[2], values[2])
    source.close()
