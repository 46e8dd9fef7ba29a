"""One rank of one row under torch's profiler: writes where the time of its steps went as JSON.

Started by profile_step.py. First come steps that are only timed, whose page faults are counted, then as many under
the profiler, which makes them slower.
"""

from __future__ import annotations

import gc
import os
import resource
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from statistics import median
from typing import Any

import torch.distributed as dist
from meter import Memory, resident, resident_kinds, write_record
from rows import Trainer, split_row
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function
from worker import draw_steps, parse, run_step, start, versions

PHASES = ("forward", "backward", "step")
MARK = "phase of a step: "
UNSEEN = 3  # steps under the profiler that are not counted


class OffProcessor:
    """Seconds in which the thread that trains was not on a processor, by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def around(self, name: str) -> Iterator[None]:
        """Measure a phase, and mark it for the profiler."""
        with record_function(MARK + name):
            wall, busy = time.perf_counter(), time.thread_time()
            yield
            self.seconds[name] += time.perf_counter() - wall - (time.thread_time() - busy)


def main() -> None:
    """Profile one row and write `OUT/rankR.json`."""
    options = parse()
    rank = int(os.environ["RANK"])
    bare = resident()
    work, trainer = start(options)
    drawn = iter(draw_steps(work, rank, options.warmup + 2 * options.steps + UNSEEN))
    for micro_batches in islice(drawn, options.warmup):
        run_step(trainer, micro_batches)
    record = timed(trainer, list(islice(drawn, options.steps)))
    # The first steps under a profiler take longer.
    profiled(trainer, list(islice(drawn, UNSEEN)))
    record |= profiled(trainer, list(drawn))
    record["memory"]["bare"] = bare
    record["versions"] = versions(split_row(options.row).kind)
    write_record(options.out, rank, record)
    dist.barrier()
    dist.destroy_process_group()


def timed(trainer: Trainer, steps: list[list[tuple[Tensor, Tensor]]]) -> dict[str, Any]:
    """Time steps without the profiler; page faults and the processor time of other threads are those of a step."""
    dist.barrier()
    before, process, thread = (
        resource.getrusage(resource.RUSAGE_SELF),
        time.process_time(),
        time.thread_time(),
    )
    memory = Memory()
    memory.restart()
    spans = [run_step(trainer, micro_batches)[0] for micro_batches in steps]
    others = time.process_time() - process - (time.thread_time() - thread)
    after = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "seconds": {name: median(span[name] for span in spans) for name in (*PHASES, "total")},
        "faults": (after.ru_minflt - before.ru_minflt) / len(steps),
        "faults_from_disk": (after.ru_majflt - before.ru_majflt) / len(steps),
        "switches": (after.ru_nvcsw - before.ru_nvcsw) / len(steps),
        "system": (after.ru_stime - before.ru_stime) / len(steps),
        "other_threads": others / len(steps),
        "memory": {"tensors": tensor_bytes(), "shared": resident_kinds()["RssShmem"], "peak": memory.peak()},
    }


def tensor_bytes() -> int:
    """Count the bytes of the tensors that Python holds, each block of memory once."""
    held = [one for one in gc.get_objects() if type(one) in (Tensor, nn.Parameter)]
    blocks = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in held}
    return sum(blocks.values())


def profiled(trainer: Trainer, steps: list[list[tuple[Tensor, Tensor]]]) -> dict[str, Any]:
    """Run steps under the profiler; seconds and calls of each operator, and what is outside of all, are of a step.

    Each has a profiler of its own: the records of many steps would lie between the blocks of memory that a step
    uses again, so that it needed new ones.
    """
    off = OffProcessor()
    operators: dict[str, Counter[str]] = {name: Counter() for name in PHASES}
    calls: dict[str, Counter[str]] = {name: Counter() for name in PHASES}
    outside = dict.fromkeys(PHASES, 0.0)
    for micro_batches in steps:
        dist.barrier()
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            run_step(trainer, micro_batches, off.around)
        for event in seen.events() or ():
            if event.name.startswith(MARK) and event.cpu_parent is None:
                phase = event.name.removeprefix(MARK)
                outside[phase] += event.self_cpu_time_total / 1e6
                for inner in descendants(event):
                    operators[phase][inner.name] += inner.self_cpu_time_total / 1e6
                    calls[phase][inner.name] += 1
    count = len(steps)
    return {
        "operators": {phase: {n: s / count for n, s in each.items()} for phase, each in operators.items()},
        "calls": {phase: {n: c / count for n, c in each.items()} for phase, each in calls.items()},
        "outside": {phase: seconds / count for phase, seconds in outside.items()},
        "off_processor": {phase: off.seconds[phase] / count for phase in PHASES},
    }


def descendants(event: Any) -> Iterator[Any]:
    """Yield the operators within an event, all the way down."""
    for child in event.cpu_children:
        yield child
        yield from descendants(child)


if __name__ == "__main__":
    main()
