"""What the ranks of one run do together: agree on errors, share measurements."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn, TypeVar

import torch

from deepspeed import comm
from deepspeed.errors import ConfigError
from gpt.errors import UserError

Made = TypeVar("Made")


def together(make: Callable[[], Made]) -> Made:
    """Run `make` on every rank. If any of them cannot go on, the first says why and all leave with code 2."""
    try:
        made, problem = make(), None
    except (UserError, ConfigError) as error:
        made, problem = None, str(error)
    problems: list[str | None] = [None] * comm.get_world_size()
    comm.all_gather_object(problems, problem)
    for said in problems:
        if said is not None:
            leave(said)
    assert made is not None
    return made


def leave(problem: str) -> NoReturn:
    """Print `problem` once and end this rank; every rank must call it."""
    if comm.get_rank() == 0:
        print(f"pretrain_gpt: {problem}", file=sys.stderr, flush=True)
    comm.barrier()  # nobody leaves before it is printed: a launcher ends the others as soon as one is gone
    comm.destroy_process_group()
    sys.exit(2)


def gather_row(values: list[float], device: torch.device) -> torch.Tensor:
    """Return the rows that all ranks gave: float64 on the host, (ranks, len(values))."""
    row = torch.tensor(values, dtype=torch.float64, device=device)
    rows = [torch.empty_like(row) for _ in range(comm.get_world_size())]
    comm.all_gather(rows, row)
    return torch.stack(rows).cpu()
