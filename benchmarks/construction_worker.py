"""One rank that builds a model under zero.Init and writes what its memory held as JSON.

Started by construction.py, which sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from meter import Memory, data_resident, resident, write_record
from model import GPT, Shape

import deepspeed


def main() -> None:
    """Build the model once and write `OUT/rankR.json`."""
    options = parse()
    shape = Shape(**json.loads(options.shape))
    rank = int(os.environ["RANK"])
    deepspeed.init_distributed(dist_backend="gloo")
    torch.manual_seed(0)
    memory = Memory()
    memory.restart()
    before, data_before = resident(), data_resident()
    began = time.perf_counter()
    with deepspeed.zero.Init(dtype=torch.bfloat16):
        model = GPT(shape)
    record = {
        "seconds": time.perf_counter() - began,
        "before": before,
        "peak": memory.peak(),
        "kept": data_resident() - data_before,
        "parameters": sum(p.ds_numel for p in model.parameters()),  # type: ignore[attr-defined]
        "versions": {"torch": str(torch.__version__), "this project": str(deepspeed.__version__)},
    }
    write_record(options.out, rank, record)
    dist.barrier()
    dist.destroy_process_group()


def parse() -> argparse.Namespace:
    """Read the command line construction.py writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", required=True, help="the fields of Shape as JSON")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
