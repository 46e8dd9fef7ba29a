"""Each schedule follows its formula, and each of its options changes the curve."""

from __future__ import annotations

import inspect
import math

import pytest
import torch

from deepspeed import schedules
from deepspeed.errors import ConfigError
from deepspeed.schedules import (
    VALID_LR_SCHEDULES,
    LRRangeTest,
    OneCycle,
    WarmupCosineLR,
    WarmupDecayLR,
    WarmupLR,
    build_scheduler,
)

BASE = (0.3, 0.1)
STEPS = 24


def optimizer(cls=torch.optim.Adam, **options):
    """Two groups with a rate of their own."""
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))], "lr": rate} for rate in BASE]
    return cls(groups, **options)


def curve(schedule, steps=STEPS):
    """Rates of both groups when made and after each step, and the first group's momentum."""

    def now():
        groups = schedule.optimizer.param_groups
        momentum = groups[0]["betas"][0] if "betas" in groups[0] else groups[0]["momentum"]
        return [*(float(group["lr"]) for group in groups), momentum]

    points = [now()]
    for _ in range(steps):
        schedule.step()
        points.append(now())
    return points


def check(schedule, expected_rates):
    """Compare with ``expected_rates(iteration, group)``."""
    first = (
        1 if isinstance(schedule, (WarmupLR, WarmupCosineLR)) else 0
    )  # Note [Warm-up starts one step late]
    for step, point in enumerate(curve(schedule)):
        iteration = max(0, step - first)
        expected = [expected_rates(iteration, group) for group in range(2)]
        assert point[:2] == pytest.approx(expected, rel=1e-9, abs=1e-12), f"after {step} steps"


# -- closed forms ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "rise"),
    [
        ("log", lambda i, n: math.log(i + 1) / math.log(n)),
        ("linear", lambda i, n: i / n),
    ],
)
@pytest.mark.parametrize("low", [0.0, 0.01, [0.01, 0.02]])
@pytest.mark.parametrize(("high", "tops"), [(None, BASE), (0.5, (0.5, 0.5)), ([0.2, 0.4], (0.2, 0.4))])
def test_warmup(kind, rise, low, high, tops):
    lows = low if isinstance(low, list) else (low, low)

    def expected(i, group):
        return lows[group] + (tops[group] - lows[group]) * (rise(i, 6) if i < 6 else 1.0)

    check(WarmupLR(optimizer(), low, high, warmup_num_steps=6, warmup_type=kind), expected)


@pytest.mark.parametrize("low", [0.0, 0.02])
def test_warmup_decay_falls_linearly_back_to_the_minimum(low):
    def expected(i, group):
        share = i / 4 if i < 4 else max(0.0, (20 - i) / 16)
        return low + (0.5 - low) * share

    check(WarmupDecayLR(optimizer(), 20, low, 0.5, warmup_num_steps=4, warmup_type="linear"), expected)


def test_warmup_cosine_scales_each_groups_own_rate():
    def expected(i, group):
        if i < 4:
            return BASE[group] * (0.1 + 0.9 * math.log(i + 1) / math.log(4))
        share = (1 + math.cos(math.pi * min(1.0, (i - 3) / 16))) / 2
        return BASE[group] * (0.2 + 0.8 * share)

    check(WarmupCosineLR(optimizer(), 20, 0.1, warmup_num_steps=4, cos_min_ratio=0.2), expected)


@pytest.mark.parametrize("staircase", [True, False])
def test_range_test(staircase):
    def expected(i, group):
        steps = i // 5 if staircase else i / 5
        return (0.1, 0.2)[group] * (1 + 3.0 * steps)

    check(LRRangeTest(optimizer(), [0.1, 0.2], 5, 3.0, staircase), expected)


@pytest.mark.parametrize("stairs", [(0, 0), (3, 2)])
def test_one_cycle_moves_rate_and_momentum_against_each_other_and_decays_both(stairs):
    up, down = stairs

    def height(i):
        part, whole, count = (i, 6, up) if i <= 6 else (14 - i, 8, down)
        return part / whole if count == 0 else (part * count // whole) / count

    def rate(i, group):
        return 0.1 + 0.9 * height(i) if i <= 14 else 0.1 / (1 + 0.5 * (i - 14) / 2)

    def momentum(i):
        return 0.95 - 0.1 * height(i) if i <= 14 else 0.95 * (1 + 0.01 * (i - 14) / 2)

    def make():
        return OneCycle(
            optimizer(), 0.1, 1.0, 0.5, 6, 8, up, down, 2, True, 0.85, 0.95, 0.01
        )  # fmt: skip

    check(make(), rate)
    assert [point[2] for point in curve(make())] == pytest.approx([momentum(i) for i in range(STEPS + 1)])


def test_one_cycle_also_drives_the_momentum_of_sgd_and_leaves_the_second_beta():
    sgd = optimizer(torch.optim.SGD, momentum=0.5)
    OneCycle(sgd, 0.1, 1.0, cycle_first_step_size=2).step()
    assert sgd.param_groups[0]["momentum"] == pytest.approx(0.85)
    adam = optimizer(betas=(0.5, 0.77))
    OneCycle(adam, 0.1, 1.0, cycle_first_step_size=2).step()
    assert adam.param_groups[1]["betas"] == (pytest.approx(0.85), 0.77)


# -- no option is dead ----------------------------------------------------------------------------

SETTINGS = {
    LRRangeTest: {
        "lr_range_test_min_lr": (0.1, 0.2),
        "lr_range_test_step_size": (3, 4),
        "lr_range_test_step_rate": (1.0, 2.0),
        "lr_range_test_staircase": (False, True),
    },
    OneCycle: {
        "cycle_min_lr": (0.1, 0.2),
        "cycle_max_lr": (1.0, 2.0),
        "decay_lr_rate": (0.5, 0.7),
        "cycle_first_step_size": (6, 5),
        "cycle_second_step_size": (6, 4),
        "cycle_first_stair_count": (3, 2),
        "cycle_second_stair_count": (3, 2),
        "decay_step_size": (2, 3),
        "cycle_momentum": (True, False),
        "cycle_min_mom": (0.8, 0.7),
        "cycle_max_mom": (0.9, 0.95),
        "decay_mom_rate": (0.01, 0.02),
    },
    WarmupLR: {
        "warmup_min_lr": (0.0, 0.01),
        "warmup_max_lr": (0.5, None),
        "warmup_num_steps": (5, 8),
        "warmup_type": ("log", "linear"),
    },
    WarmupDecayLR: {
        "total_num_steps": (20, 30),
        "warmup_min_lr": (0.0, 0.01),
        "warmup_max_lr": (0.5, None),
        "warmup_num_steps": (5, 8),
        "warmup_type": ("log", "linear"),
    },
    WarmupCosineLR: {
        "total_num_steps": (20, 30),
        "warmup_min_ratio": (0.0, 0.2),
        "warmup_num_steps": (5, 8),
        "cos_min_ratio": (0.0, 0.3),
        "warmup_type": ("log", "linear"),
    },
}
OPTIONS = [(cls, option) for cls, options in SETTINGS.items() for option in options]


def test_the_table_of_options_is_complete():
    assert [cls.__name__ for cls in SETTINGS] == VALID_LR_SCHEDULES
    for cls, options in SETTINGS.items():
        assert set(inspect.signature(cls).parameters) == {*options, "optimizer", "last_batch_iteration"}


@pytest.mark.parametrize(("cls", "option"), OPTIONS, ids=lambda value: getattr(value, "__name__", value))
def test_changing_an_option_changes_the_curve(cls, option):
    usual = {name: values[0] for name, values in SETTINGS[cls].items()}
    changed = {**usual, option: SETTINGS[cls][option][1]}
    assert curve(cls(optimizer(), **usual)) != curve(cls(optimizer(), **changed))


# -- position -------------------------------------------------------------------------------------

MADE = [(cls, {name: values[0] for name, values in options.items()}) for cls, options in SETTINGS.items()]
every_schedule = pytest.mark.parametrize(("cls", "options"), MADE, ids=lambda v: getattr(v, "__name__", ""))


@every_schedule
def test_saved_anywhere_it_continues_the_same_curve(cls, options):
    whole = curve(cls(optimizer(), **options))
    for stop in (1, 3, 9):
        first = cls(optimizer(), **options)
        head = curve(first, stop)
        second = cls(optimizer(), **options)
        second.load_state_dict(first.state_dict())
        assert second.get_last_lr() == head[-1][:2]
        assert head + curve(second, STEPS - stop)[1:] == whole


@every_schedule
def test_continuing_from_an_iteration_sets_nothing_until_the_next_step(cls, options):
    late = cls(optimizer(), **options, last_batch_iteration=3)
    assert [group["lr"] for group in late.optimizer.param_groups] == list(BASE)
    late.step()
    fresh = cls(optimizer(), **options)
    fresh.step(4)
    assert late.get_last_lr() == fresh.get_last_lr() == late.get_lr()


@every_schedule
def test_there_is_no_last_rate_before_the_first_step(cls, options):
    with pytest.raises(AssertionError, match="need to call step"):
        cls(optimizer(), **options).get_last_lr()


def test_a_rate_kept_in_a_tensor_is_written_in_place():
    adam = torch.optim.Adam([torch.nn.Parameter(torch.ones(1))], lr=torch.tensor(0.5))
    rate = adam.param_groups[0]["lr"]
    schedule = WarmupLR(adam, warmup_num_steps=2, warmup_type="linear")
    schedule.step(1)
    assert adam.param_groups[0]["lr"] is rate
    assert float(rate) == pytest.approx(0.25)


# -- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "params", "text"),
    [
        ("WarmupLr", {}, r"scheduler\.type.*'WarmupLr'.*did you mean 'WarmupLR'"),
        ("StepLr", {}, "did you mean 'StepLR'"),
        ("WarmupLR", {"warmup_steps": 1}, r"scheduler\.params\.warmup_steps.*did you mean"),
        ("WarmupLR", {"warmup_num_steps": 0}, r"warmup_num_steps: expected .* above 0, got 0"),
        ("WarmupLR", {"warmup_num_steps": "10"}, r"warmup_num_steps: expected a number, got '10'"),
        ("WarmupLR", {"warmup_max_lr": "auto"}, r"warmup_max_lr: expected a number or a list"),
        ("WarmupLR", {"warmup_max_lr": [0.1]}, r"warmup_max_lr: expected one number or 2, got 1"),
        ("WarmupLR", {"warmup_type": "cubic"}, r'warmup_type: expected "log" or "linear", got \'cubic\''),
        ("WarmupDecayLR", {}, r"scheduler\.params\.total_num_steps: WarmupDecayLR needs it"),
        ("OneCycle", {"cycle_min_lr": 0.1}, r"cycle_max_lr: OneCycle needs it"),
        (
            "OneCycle",
            {"cycle_min_lr": 0, "cycle_max_lr": 1, "cycle_momentum": "no"},
            "expected true or false",
        ),
        ("LRRangeTest", {"lr_range_test_step_size": -2}, "lr_range_test_step_size"),
        ("StepLR", {"step_size": "3"}, r"scheduler\.params\.step_size: expected a number, got '3'"),
        ("OneCycleLR", {"max_lr": 1.0}, r"scheduler\.params: OneCycleLR refused them"),
    ],
)
def test_mistakes_are_named(name, params, text):
    with pytest.raises(ConfigError, match=text):
        build_scheduler(name, params, optimizer())


def test_torchs_schedules_are_found_by_name():
    schedule = build_scheduler("StepLR", {"step_size": 3, "gamma": 0.5}, optimizer())
    assert isinstance(schedule, torch.optim.lr_scheduler.StepLR)


def test_something_without_groups_is_not_an_optimizer():
    with pytest.raises(TypeError, match="param_groups"):
        WarmupLR(torch.nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: WarmupDecayLR(optimizer(), 3, warmup_num_steps=5), "total_num_steps 3 is less than"),
        (lambda: WarmupCosineLR(optimizer(), 4, warmup_num_steps=6), "total_num_steps 4 is less than"),
        (lambda: OneCycle(optimizer(torch.optim.Adagrad), 0.1, 1.0), "no momentum to cycle"),
    ],
)
def test_what_cannot_take_effect_is_warned_about(make, text, monkeypatch):
    said = []
    monkeypatch.setattr(schedules, "warn_once", said.append)
    make()
    assert len(said) == 1
    assert text in said[0]


@pytest.mark.parametrize("cls", [WarmupLR, WarmupCosineLR])
def test_a_schedule_over_an_optimizer_that_was_warming_up_keeps_the_groups_own_rate(cls):
    options = {"total_num_steps": 20} if cls is WarmupCosineLR else {}
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    first = cls(optimizer, warmup_num_steps=10, **options)
    for _ in range(4):
        first.step()
    again = cls(optimizer, warmup_num_steps=10, **options)
    again.load_state_dict(first.state_dict())
    assert again.get_last_lr() == first.get_last_lr()


@pytest.mark.parametrize(
    "make",
    [
        lambda opt: LRRangeTest(opt, 0.01, 3),
        lambda opt: OneCycle(opt, 0.01, 0.2, cycle_first_step_size=5),
        lambda opt: WarmupLR(opt, warmup_num_steps=6),
        lambda opt: WarmupDecayLR(opt, 20, warmup_num_steps=6),
        lambda opt: WarmupCosineLR(opt, 20, warmup_num_steps=6),
    ],
)
def test_every_schedule_leaves_a_note_of_the_groups_own_rates(make):
    schedule = make(optimizer())
    for _ in range(3):
        schedule.step()
    assert [group["initial_lr"] for group in schedule.optimizer.param_groups] == list(BASE)


def test_a_rate_that_is_a_tensor_is_noted_as_it_was():
    weight = torch.nn.Parameter(torch.zeros(1))
    given = torch.optim.Adam([weight], lr=torch.tensor(0.5), capturable=True)
    WarmupLR(given, warmup_num_steps=10)
    assert given.param_groups[0]["lr"] == 0
    assert WarmupLR(given, warmup_num_steps=10).rates(10) == [0.5]


def test_a_schedule_over_restored_groups_keeps_the_groups_own_rates():
    first = WarmupLR(optimizer(), warmup_num_steps=10)
    for _ in range(4):
        first.step()
    restored = optimizer()
    restored.load_state_dict(first.optimizer.state_dict())
    assert WarmupLR(restored, warmup_num_steps=10).rates(10) == list(BASE)


@pytest.mark.parametrize("name", ["LRScheduler", "_LRScheduler", "Optimizer", "Schedule"])
def test_base_classes_are_no_schedules(name):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    with pytest.raises(ConfigError, match=r"scheduler\.type: expected LRRangeTest"):
        build_scheduler(name, {}, optimizer)
