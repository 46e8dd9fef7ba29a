"""Times the fused Adam update of one leaf on the device beside a copy within its memory. Run by gpu.py."""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median

import adam_step
import gpu_device
import torch
from meter import write_record

from deepspeed.ops.adam import path_in_use

CALLS, ROUNDS = 10, 7


def main() -> None:
    """Measure and write `OUT/rank0.json`: seconds of an update, bytes a second of a copy."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--numel", type=int, required=True, help="elements of the leaf")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    path, reason = path_in_use(gpu_device.kind())
    with torch.device(gpu_device.kind()), torch.no_grad():
        update = adam_step.ours(options.numel, compiled=path == "compiled")
        update()
        seconds = median(gpu_device.seconds_of(update, CALLS) for _ in range(ROUNDS))
        copied = gpu_device.copy_bandwidth()
    form = f"{path} ({reason})"
    record = {"numel": options.numel, "seconds": seconds, "path": form, "copy": copied}
    write_record(options.out, 0, record)


if __name__ == "__main__":
    main()
