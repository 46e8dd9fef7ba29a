"""Learning-rate schedules: WarmupLR, WarmupDecayLR, WarmupCosineLR, OneCycle, LRRangeTest, torch's by name.

A schedule sets the rate of iteration 0 when it is made and advances once per applied update. Each param group
keeps its own base rate.

Note [Warm-up starts one step late]
After n steps the cyclic schedules stand at iteration n, the warm-up schedules at iteration n - 1: two updates
use the rate of iteration 0. The original counts so, and curves recorded with it must be met again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch.optim import lr_scheduler as torch_schedules

from deepspeed.common.logging import warn_once
from deepspeed.common.signatures import check_arguments
from deepspeed.errors import ConfigError, did_you_mean


class HasGroups(Protocol):
    """An optimizer, or anything with param groups."""

    param_groups: list[dict[str, Any]]


PerGroup = float | Sequence[float]


class Schedule:
    """Base: counts iterations and writes what `rates` (and `momenta`) return to the param groups.

    Args:
        optimizer: anything with ``param_groups``.
        last_batch_iteration: iteration to continue from; -1 starts anew.

    Raises:
        TypeError: `optimizer` has no param groups.
    """

    late = 0
    """Iterations behind the number of steps; see Note [Warm-up starts one step late]."""

    def __init__(self, optimizer: HasGroups, last_batch_iteration: int = -1) -> None:
        if not isinstance(getattr(optimizer, "param_groups", None), list):
            raise TypeError(f"optimizer: expected one with param_groups, got {type(optimizer).__name__}")
        for group in optimizer.param_groups:  # a number: a rate that is a tensor is overwritten in place
            group.setdefault("initial_lr", float(group["lr"]))
        self.optimizer = optimizer
        self.last_batch_iteration = last_batch_iteration
        self._last_lr: list[float] | None = None

    def _start(self) -> None:
        """Apply the first rates; subclasses call this when their options are set."""
        if self.last_batch_iteration == -1:
            self._apply()

    def rates(self, iteration: int) -> list[float]:
        """Return the learning rate of each group at `iteration`."""
        raise NotImplementedError

    def momenta(self, iteration: int) -> list[float] | None:
        """Return the momentum of each group at `iteration`; None leaves it alone."""
        return None

    def step(self, last_batch_iteration: int | None = None) -> None:
        """Move to the next iteration, or to the given one."""
        if last_batch_iteration is None:
            last_batch_iteration = self.last_batch_iteration + 1
        self.last_batch_iteration = last_batch_iteration
        self._last_lr = self._apply()

    @property
    def iteration(self) -> int:
        """The iteration whose rates hold now."""
        return max(0, self.last_batch_iteration + 1 - self.late)

    def _apply(self) -> list[float]:
        iteration = self.iteration
        rates = self.rates(iteration)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            if isinstance(group["lr"], torch.Tensor):  # capturable optimizers read it on the device
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        momenta = self.momenta(iteration)
        for group, momentum in zip(self.optimizer.param_groups, momenta or (), strict=momenta is not None):
            if "betas" in group:
                group["betas"] = (momentum, *group["betas"][1:])
            else:
                group["momentum"] = momentum
        return rates

    def get_lr(self) -> list[float]:
        """Return the rates of the present iteration."""
        return self.rates(self.iteration)

    def get_last_lr(self) -> list[float]:
        """Return the rates that the last `step` set."""
        assert self._last_lr is not None, "need to call step() first"
        return self._last_lr

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs."""
        return {"last_batch_iteration": self.last_batch_iteration}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where another schedule stopped; the rates are set at once."""
        self.last_batch_iteration = state_dict["last_batch_iteration"]
        self._last_lr = self._apply()

    def _own_rates(self) -> list[float]:
        """Return each group's own rate: the one it had before any schedule changed it, torch's too."""
        return [float(group["initial_lr"]) for group in self.optimizer.param_groups]

    def _per_group(self, name: str, value: PerGroup) -> list[float]:
        groups = len(self.optimizer.param_groups)
        if isinstance(value, (int, float)):
            return [float(value)] * groups
        if len(value) != groups:
            raise ConfigError(f"scheduler.params.{name}: expected one number or {groups}, got {len(value)}")
        return [float(one) for one in value]


class LRRangeTest(Schedule):
    """Raise the rate from a minimum, to find where training diverges (arXiv 1803.09820).

    Args:
        optimizer: the optimizer.
        lr_range_test_min_lr: first rate, one number or one per group.
        lr_range_test_step_size: iterations per step.
        lr_range_test_step_rate: growth per step, as a share of the first rate.
        lr_range_test_staircase: grow at steps only instead of continuously.
        last_batch_iteration: iteration to continue from.
    """

    def __init__(
        self,
        optimizer: HasGroups,
        lr_range_test_min_lr: PerGroup = 1e-3,
        lr_range_test_step_size: int = 2000,
        lr_range_test_step_rate: float = 1.0,
        lr_range_test_staircase: bool = False,
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(optimizer, last_batch_iteration)
        _positive("lr_range_test_step_size", lr_range_test_step_size)
        self.min_lr = self._per_group("lr_range_test_min_lr", lr_range_test_min_lr)
        self.step_size = lr_range_test_step_size
        self.step_rate = lr_range_test_step_rate
        self.staircase = lr_range_test_staircase
        self._start()

    def rates(self, iteration: int) -> list[float]:
        steps = iteration / self.step_size
        growth = 1 + self.step_rate * (math.floor(steps) if self.staircase else steps)
        return [low * growth for low in self.min_lr]


class OneCycle(Schedule):
    """One cycle of rate up and down (momentum the other way), then decay (arXiv 1803.09820).

    Args:
        optimizer: the optimizer.
        cycle_min_lr, cycle_max_lr: ends of the cycle, one number or one per group.
        decay_lr_rate: after the cycle the rate is ``cycle_min_lr / (1 + decay_lr_rate * steps)``.
        cycle_first_step_size: iterations up.
        cycle_second_step_size: iterations down; None: as many as up.
        cycle_first_stair_count: stairs on the way up; 0 climbs continuously.
        cycle_second_stair_count: stairs on the way down; None: as many as up.
        decay_step_size: iterations per decay step; 0 does not decay.
        cycle_momentum: cycle the momentum (the first beta of Adam) as well.
        cycle_min_mom, cycle_max_mom: ends of the momentum's cycle.
        decay_mom_rate: after the cycle momentum is ``cycle_max_mom * (1 + decay_mom_rate * steps)``.
        last_batch_iteration: iteration to continue from.
    """

    def __init__(
        self,
        optimizer: HasGroups,
        cycle_min_lr: PerGroup,
        cycle_max_lr: PerGroup,
        decay_lr_rate: float = 0.0,
        cycle_first_step_size: int = 2000,
        cycle_second_step_size: int | None = None,
        cycle_first_stair_count: int = 0,
        cycle_second_stair_count: int | None = None,
        decay_step_size: int = 0,
        cycle_momentum: bool = True,
        cycle_min_mom: float = 0.8,
        cycle_max_mom: float = 0.9,
        decay_mom_rate: float = 0.0,
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(optimizer, last_batch_iteration)
        second = cycle_first_step_size if cycle_second_step_size is None else cycle_second_step_size
        _positive("cycle_first_step_size", cycle_first_step_size)
        _positive("cycle_second_step_size", second)
        self.min_lr = self._per_group("cycle_min_lr", cycle_min_lr)
        self.max_lr = self._per_group("cycle_max_lr", cycle_max_lr)
        self.decay_lr_rate, self.decay_mom_rate = decay_lr_rate, decay_mom_rate
        self.up, self.down = cycle_first_step_size, second
        self.up_stairs = cycle_first_stair_count
        self.down_stairs = (
            cycle_first_stair_count if cycle_second_stair_count is None else cycle_second_stair_count
        )
        self.decay_step_size = decay_step_size
        self.min_mom, self.max_mom = cycle_min_mom, cycle_max_mom
        self.cycle_momentum = cycle_momentum and _has_momentum(optimizer)
        self._start()

    def rates(self, iteration: int) -> list[float]:
        if iteration > self.up + self.down:
            shrink = 1 + self.decay_lr_rate * self._decay_steps(iteration)
            return [low / shrink for low in self.min_lr]
        height = self._height(iteration)
        return [low + (high - low) * height for low, high in zip(self.min_lr, self.max_lr, strict=True)]

    def momenta(self, iteration: int) -> list[float] | None:
        if not self.cycle_momentum:
            return None
        if iteration > self.up + self.down:
            momentum = self.max_mom * (1 + self.decay_mom_rate * self._decay_steps(iteration))
        else:
            momentum = self.max_mom - (self.max_mom - self.min_mom) * self._height(iteration)
        return [momentum] * len(self.optimizer.param_groups)

    def _height(self, iteration: int) -> float:
        """How far up the cycle is, from 0 to 1."""
        if iteration <= self.up:
            return _stairs(iteration, self.up, self.up_stairs)
        return _stairs(self.up + self.down - iteration, self.down, self.down_stairs)

    def _decay_steps(self, iteration: int) -> float:
        past = iteration - self.up - self.down
        return past / self.decay_step_size if self.decay_step_size > 0 else 0.0


class WarmupLR(Schedule):
    """Raise each group's rate from a minimum to a maximum, then hold it.

    Args:
        optimizer: the optimizer.
        warmup_min_lr: first rate, one number or one per group.
        warmup_max_lr: rate after warm-up, likewise; None: each group's own rate.
        warmup_num_steps: iterations of warm-up (at least 2 are used).
        warmup_type: "log" or "linear".
        last_batch_iteration: iteration to continue from.
    """

    late = 1

    def __init__(
        self,
        optimizer: HasGroups,
        warmup_min_lr: PerGroup = 0.0,
        warmup_max_lr: PerGroup | None = None,
        warmup_num_steps: int = 1000,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(optimizer, last_batch_iteration)
        self._warm_up = _WarmUp(warmup_num_steps, warmup_type)
        self.min_lr = self._per_group("warmup_min_lr", warmup_min_lr)
        own = self._own_rates()
        self.max_lr = own if warmup_max_lr is None else self._per_group("warmup_max_lr", warmup_max_lr)
        self._start()

    def rates(self, iteration: int) -> list[float]:
        share = self._warm_up.share(iteration) if iteration < self._warm_up.steps else self.after(iteration)
        return [low + (high - low) * share for low, high in zip(self.min_lr, self.max_lr, strict=True)]

    def after(self, iteration: int) -> float:
        """Return how far up between minimum and maximum the rate is after warm-up."""
        return 1.0


class WarmupDecayLR(WarmupLR):
    """Warm up, then fall linearly back to the minimum at `total_num_steps`.

    Args:
        optimizer: the optimizer.
        total_num_steps: iterations in all.
        warmup_min_lr, warmup_max_lr, warmup_num_steps, warmup_type, last_batch_iteration: see `WarmupLR`.
    """

    def __init__(
        self,
        optimizer: HasGroups,
        total_num_steps: int,
        warmup_min_lr: PerGroup = 0.0,
        warmup_max_lr: PerGroup | None = 1e-3,
        warmup_num_steps: int = 1000,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        self.total_num_steps = _checked_total(total_num_steps, warmup_num_steps)
        super().__init__(
            optimizer, warmup_min_lr, warmup_max_lr, warmup_num_steps, warmup_type, last_batch_iteration
        )

    def after(self, iteration: int) -> float:
        left = self.total_num_steps - iteration
        return max(0.0, left / max(1.0, self.total_num_steps - self._warm_up.steps))


class WarmupCosineLR(Schedule):
    """Warm up to each group's own rate, then follow half a cosine down.

    Args:
        optimizer: the optimizer.
        total_num_steps: iterations in all.
        warmup_min_ratio: first rate, as a share of the group's.
        warmup_num_steps: iterations of warm-up (at least 2 are used).
        cos_min_ratio: last rate, as a share of the group's.
        warmup_type: "log" or "linear".
        last_batch_iteration: iteration to continue from.
    """

    late = 1

    def __init__(
        self,
        optimizer: HasGroups,
        total_num_steps: int,
        warmup_min_ratio: float = 0.0,
        warmup_num_steps: int = 1000,
        cos_min_ratio: float = 1e-4,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(optimizer, last_batch_iteration)
        self.total_num_steps = _checked_total(total_num_steps, warmup_num_steps)
        self._warm_up = _WarmUp(warmup_num_steps, warmup_type)
        self.warmup_min_ratio, self.cos_min_ratio = warmup_min_ratio, cos_min_ratio
        self.base_lr = self._own_rates()
        self._start()

    def rates(self, iteration: int) -> list[float]:
        return [base * self.ratio(iteration) for base in self.base_lr]

    def ratio(self, iteration: int) -> float:
        """Return the share of each group's own rate at `iteration`."""
        steps = self._warm_up.steps
        if iteration < steps:
            return self.warmup_min_ratio + (1 - self.warmup_min_ratio) * self._warm_up.share(iteration)
        progress = min(1.0, (iteration - steps + 1) / max(1, self.total_num_steps - steps))
        return self.cos_min_ratio + (1 - self.cos_min_ratio) * (1 + math.cos(math.pi * progress)) / 2


class _WarmUp:
    """The rising part that three schedules share."""

    def __init__(self, steps: int, kind: str) -> None:
        _positive("warmup_num_steps", steps)
        if kind not in ("log", "linear"):
            raise ConfigError(f'scheduler.params.warmup_type: expected "log" or "linear", got {kind!r}')
        self.steps = max(2, steps)
        self.kind = kind

    def share(self, iteration: int) -> float:
        """How much of the way up is done, from 0 to 1."""
        if self.kind == "log":
            return math.log(iteration + 1) / math.log(self.steps)
        return iteration / self.steps


def _has_momentum(optimizer: HasGroups) -> bool:
    if all("betas" in group or "momentum" in group for group in optimizer.param_groups):
        return True
    warn_once("scheduler.params.cycle_momentum: the optimizer has no momentum to cycle; false says so")
    return False


def _stairs(part: int, whole: int, count: int) -> float:
    """Return ``part / whole``, rounded down to a multiple of ``1 / count`` unless the count is 0."""
    return math.floor(part * count / whole) / count if count > 0 else part / whole


def _positive(name: str, value: float) -> None:
    if value <= 0:
        raise ConfigError(f"scheduler.params.{name}: expected a number above 0, got {value}")


def _checked_total(total: int, warm_up: int) -> int:
    _positive("total_num_steps", total)
    if total < warm_up:
        warn_once(f"scheduler.params: total_num_steps {total} is less than warmup_num_steps {warm_up}")
    return total


_SCHEDULES: dict[str, type[Schedule]] = {
    cls.__name__: cls for cls in (LRRangeTest, OneCycle, WarmupLR, WarmupDecayLR, WarmupCosineLR)
}
VALID_LR_SCHEDULES = list(_SCHEDULES)
"""Names of the schedules defined here."""


def _torch_schedules() -> dict[str, Any]:
    """The schedules of torch by name, without their base classes."""
    base = torch_schedules.LRScheduler
    return {
        name: cls
        for name, cls in vars(torch_schedules).items()
        if isinstance(cls, type) and issubclass(cls, base) and cls is not base and not name.startswith("_")
    }


def build_scheduler(type_name: str, params: dict[str, Any], optimizer: torch.optim.Optimizer) -> Any:
    """Build the schedule that ``scheduler.type`` and ``scheduler.params`` describe.

    Args:
        type_name: one of `VALID_LR_SCHEDULES`, or a class of ``torch.optim.lr_scheduler``.
        params: arguments of its constructor.
        optimizer: what it drives.

    Raises:
        ConfigError: no such schedule or argument; the message names the nearest one.
    """
    known = {**_torch_schedules(), **_SCHEDULES}
    if type_name not in known:
        raise ConfigError(
            f"scheduler.type: expected {', '.join(VALID_LR_SCHEDULES)} or a class of "
            f"torch.optim.lr_scheduler, got {type_name!r}{did_you_mean(type_name, known)}"
        )
    cls = known[type_name]
    check_arguments("scheduler.params", cls, params)
    try:
        return cls(optimizer, **params)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"scheduler.params: {type_name} refused them: {error}") from error
