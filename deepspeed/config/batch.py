"""The batch triangle: train_batch_size = micro-batch x accumulation steps x data-parallel ranks.

train                                       samples per optimizer step, over all ranks
├── rank 0:  micro | micro | ... gas times
└── rank 1:  micro | micro | ... gas times
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace

from deepspeed.errors import ConfigError

TRAIN = "train_batch_size"
MICRO = "train_micro_batch_size_per_gpu"
GAS = "gradient_accumulation_steps"


@dataclass(frozen=True)
class BatchSizes:
    """Samples per step, per rank and forward, and how they multiply; None while "auto" waits for data."""

    train: int | None
    micro: int | None
    gas: int
    dp: int

    def complete(self, micro: int) -> BatchSizes:
        """Return the sizes with the micro-batch seen in the data; known sizes stay."""
        return self if self.micro is not None else self.with_micro(micro)

    def with_train(self, train: int) -> BatchSizes:
        """Return the sizes for a new `train`, by other accumulation steps.

        Raises ConfigError when `train` is not a multiple of one micro-batch on every rank.
        """
        _check_positive(TRAIN, train)
        return solve(train, self.micro, None if self.micro is not None else self.gas, self.dp)

    def with_micro(self, micro: int) -> BatchSizes:
        """Return the sizes for a new micro-batch; `train` follows, accumulation steps stay."""
        _check_positive(MICRO, micro)
        return replace(self, micro=micro, train=micro * self.gas * self.dp)


def solve(
    train: int | str | None,
    micro: int | str | None,
    gas: int | str | None,
    dp: int,
    *,
    sources: Mapping[str, str] | None = None,
    ranks_seen_hint: bool = True,
) -> BatchSizes:
    """Derive what is missing or "auto"; `train` and `micro` stay None when only data can tell them.

    `sources` says where each given number came from, for the error. `ranks_seen_hint` lets the error ask
    about a launcher when `dp` is 1. Raises ConfigError when the product does not hold.
    """
    known = [value if isinstance(value, int) else None for value in (train, micro, gas)]
    t, m, g = known
    if t is None and m is None:
        if "auto" not in (train, micro, gas):
            raise ConfigError(
                f'{TRAIN}: expected a number or "auto", got nothing; '
                f"Either {TRAIN} or {MICRO} needs to be provided"
            )
        return BatchSizes(None, None, g or 1, dp)
    sizes = _derive(t, m, g, dp)
    if sizes is None:
        raise ConfigError(_explain(t, m, g, dp, sources or {}, ranks_seen_hint))
    return sizes


def _derive(t: int | None, m: int | None, g: int | None, dp: int) -> BatchSizes | None:
    """Return all sizes, or None when they do not multiply."""
    if t is None:
        if m is None:
            return None
        return BatchSizes(m * (g or 1) * dp, m, g or 1, dp)
    if m is None:
        g = g or 1
        m = t // (g * dp)
    elif g is None:
        g = t // (m * dp)
    return BatchSizes(t, m, g, dp) if m and g and m * g * dp == t else None


def _explain(
    t: int | None, m: int | None, g: int | None, dp: int, sources: Mapping[str, str], hint: bool
) -> str:
    numbers = [
        f"{name} = {value} ({sources.get(name, 'given')})"
        for name, value in ((TRAIN, t), (MICRO, m), (GAS, g))
        if value is not None
    ]
    product = " x ".join(str(value) for value in (m, g, dp) if value is not None)
    relation = "" if None not in (m, g) else "a multiple of "
    text = (
        f"{TRAIN}: expected {relation}micro-batch x accumulation steps x ranks ({product}), got {t}\n"
        f"  numbers: {', '.join(numbers)}, data-parallel ranks = {dp} (seen)\n"
        f"  nearest valid: {' or '.join(_nearest(t or 0, m, g, dp))}"
    )
    if dp == 1 and hint:
        text += "\n  only 1 rank was seen; was the job started with a launcher?"
    if dp > 1 and _counted_by_accelerate() == 1:
        text += (
            "\n  Accelerate counts 1 process, as it does without a GPU until a backend is named: pass "
            'kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] to Accelerator; for a Trainer, launch with '
            'accelerate launch --use_deepspeed, make PartialState(backend="gloo") first, and pass '
            'accelerator_config={"use_configured_state": True} to TrainingArguments'
        )
    return text


def _counted_by_accelerate() -> int | None:
    """How many processes Accelerate counts; None where the script does not use it."""
    state = getattr(sys.modules.get("accelerate.state"), "PartialState", None)
    count: int | None = getattr(state, "_shared_state", {}).get("num_processes")
    return count


def _nearest(t: int, m: int | None, g: int | None, dp: int) -> list[str]:
    """Return the two valid settings nearest to what was asked."""
    if m is None or g is None:
        step = (m or 1) * (g or 1) * dp
        low = max(step, t // step * step)
        return [f"{TRAIN} = {low}", f"{TRAIN} = {low + step}"]
    keep = f"{TRAIN} = {m * g * dp}"
    if t % (m * dp) == 0:
        return [keep, f"{GAS} = {t // (m * dp)}"]
    if t % (g * dp) == 0:
        return [keep, f"{MICRO} = {t // (g * dp)}"]
    steps = max(1, round(t / (m * dp)))
    if steps == g:
        steps += 1
    return [keep, f"{TRAIN} = {m * steps * dp} with {GAS} = {steps}"]


def _check_positive(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name}: expected an integer of at least 1, got {value!r}")
