"""``ds_ckpt export``: the whole weights of a checkpoint in files that others read."""

from __future__ import annotations

import argparse

import torch
from rich.filesize import decimal

from deepspeed.checkpoint.tools.contents import PATIENCE, opened
from deepspeed.checkpoint.tools.finding import locate
from deepspeed.checkpoint.weight_files import size_in_bytes
from deepspeed.checkpoint.whole import write_tensors
from deepspeed.checkpoint.zero_to_fp32 import whole_weights
from deepspeed.common.progress import ByteBar

NAMES = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def run(asked: argparse.Namespace) -> int:
    """Run the command."""
    max_bytes = size_in_bytes(asked.max_shard_size)
    folder = locate(asked.folder, asked.tag)
    with opened(folder) as reader, ByteBar(f"exporting {folder}", patience=PATIENCE) as bar:
        tensors = whole_weights(reader, exclude_frozen=asked.exclude_frozen_parameters)
        for tensor in tensors:
            if tensor.dtype.is_floating_point:
                tensor.narrow(DTYPES[asked.dtype])
            bar.expect(tensor.nbytes_saved)
        reader.progress = bar.advance
        written = write_tensors(tensors, asked.out, NAMES[asked.format], max_bytes)
    for entry in written:
        print(f"{asked.out / entry.name}: {decimal(entry.size)}")
    return 0
