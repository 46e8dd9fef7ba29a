"""Measuring one setting after the other: what to try, what came out, and which is best."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import median

from deepspeed.offload.tools.measure import Bench, Setting

NEAR = 0.97
"""A setting this near to the fastest is as good: the difference is noise."""


@dataclass(frozen=True)
class Grid:
    """The values to try of each part of a setting."""

    block_size: Sequence[int]
    queue_depth: Sequence[int]
    io_parallel: Sequence[int] = (1,)

    def settings(self) -> list[Setting]:
        """Return every combination, small ones first."""
        return [Setting(*one) for one in product(self.block_size, self.queue_depth, self.io_parallel)]


@dataclass(frozen=True)
class Result:
    """Bytes a second of one setting; None where a direction was not measured."""

    setting: Setting
    write: float | None
    read: float | None

    @property
    def score(self) -> float:
        """Bytes a second of moving every byte once in each measured direction."""
        rates = [rate for rate in (self.write, self.read) if rate is not None]
        return len(rates) / sum(1 / rate for rate in rates)


def measure(
    bench: Bench, settings: Iterable[Setting], directions: Sequence[str], *, loops: int, warmup: int = 1
) -> Iterator[Result]:
    """Yield the result of each setting; `directions` are among "write" and "read"; rates are of the median loop."""
    for setting in settings:
        rates = {
            way: bench.nbytes
            / median(bench.seconds(setting, write=way == "write", loops=loops, warmup=warmup))
            for way in directions
        }
        yield Result(setting, rates.get("write"), rates.get("read"))


def best(results: Sequence[Result]) -> Result:
    """Return the result that asks for least at once among those as fast as the fastest."""
    fastest = max(result.score for result in results)
    near = [result for result in results if result.score >= NEAR * fastest]
    return min(near, key=lambda result: (result.setting.in_flight, -result.score))
