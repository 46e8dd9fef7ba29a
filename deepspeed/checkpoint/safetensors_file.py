"""One safetensors file, written range by range: its header first, which says where every tensor will be.

file    [ bytes of the header ][ header: JSON ][ tensor ][ tensor ] ... [ tensor ]
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import torch

from deepspeed.checkpoint.records import FileWriter, Room
from deepspeed.errors import UsageError
from deepspeed.offload.disk import Disk

ALIGNMENT = 8
"""Bytes; where the values begin is a multiple of it."""

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The format's names of dtypes."""


class SafetensorsWriter(FileWriter):
    """Write one safetensors file.

    Args:
        path: of the file; what is there is replaced.
        rooms: the tensors, by name.
        disk: see `FileWriter`, as `here`.

    Raises:
        UsageError: the format has no name for a dtype.
    """

    def __init__(self, path: Path, rooms: Mapping[str, Room], disk: Disk, *, here: bool = False) -> None:
        # wide dtypes first: every tensor then begins at a multiple of its dtype's size, where readers map it
        order = sorted(rooms, key=lambda name: -rooms[name].dtype.itemsize)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        places, position = [], 0
        for index, name in enumerate(order):
            room = rooms[name]
            room.index = index
            header[name] = {
                "dtype": _name_of(name, room.dtype),
                "shape": list(room.shape),
                "data_offsets": [position, position + room.nbytes],
            }
            places.append((position, room.nbytes))
            position += room.nbytes
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % ALIGNMENT)
        begin = struct.calcsize("<Q") + len(text)
        with open(path, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(begin + position)
        places = [(begin + start, nbytes) for start, nbytes in places]
        super().__init__(path, [rooms[name] for name in order], places, disk, here=here)


def _name_of(tensor: str, dtype: torch.dtype) -> str:
    if dtype not in DTYPES:
        raise UsageError(
            f"{tensor}: safetensors holds no {dtype}; write pytorch_model.bin, without checkpoint.save_safetensors"
        )
    return DTYPES[dtype]
