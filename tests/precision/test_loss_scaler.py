"""The loss scale follows each key of the fp16 section."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from deepspeed.errors import LossScaleError
from deepspeed.precision.loss_scaler import DynamicLossScaler, StaticLossScaler, create_loss_scaler


def scales(scaler, outcomes):
    """Return the scale after each step; "o" is an overflow, "." a clean step."""
    seen = []
    for outcome in outcomes:
        scaler.update(outcome == "o")
        seen.append(scaler.scale)
    return seen


def dynamic(**options):
    return DynamicLossScaler(**{"scale": 64.0, "window": 3, "hysteresis": 1, **options})


def test_a_static_scale_never_moves():
    assert scales(StaticLossScaler(8.0), "oo..o") == [8.0] * 5


def test_it_doubles_after_each_window_of_clean_steps_in_a_row():
    assert scales(dynamic(), "......") == [64, 64, 128, 128, 128, 256]
    assert scales(dynamic(window=2), "....") == [64, 128, 128, 256]
    assert scales(dynamic(), "..o...") == [64, 64, 32, 32, 32, 64]


def test_it_halves_once_its_patience_is_used_up():
    assert scales(dynamic(hysteresis=1), "oo") == [32, 16]
    assert scales(dynamic(hysteresis=3), "oooo") == [64, 64, 32, 16]


def test_patience_comes_back_with_a_doubling_or_with_any_clean_step():
    assert scales(dynamic(hysteresis=2), "o.o") == [64, 64, 32]
    assert scales(dynamic(hysteresis=2, consecutive_hysteresis=True), "o.o") == [64, 64, 64]
    assert scales(dynamic(hysteresis=2), "o...o") == [64, 64, 64, 128, 128]


def test_it_stops_at_the_minimum_and_says_who_overflowed():
    scaler = dynamic(scale=8.0, min_scale=3.0)
    assert scales(scaler, "oo") == [4, 3]
    with pytest.raises(LossScaleError, match=r"fp16\.min_loss_scale.*minimum 3.*'layers\.0\.weight'"):
        scaler.update(True, "layers.0.weight")
    with pytest.raises(LossScaleError, match="not finite"):
        scaler.update(True)


def test_patience_counts_at_the_minimum_too():
    scaler = dynamic(scale=1.0, hysteresis=2)
    scaler.update(True)
    with pytest.raises(LossScaleError):
        scaler.update(True)


@pytest.mark.parametrize("stop", range(1, 9))
def test_a_saved_scaler_continues_as_if_it_had_not_stopped(stop):
    outcomes, options = ".o..o.o..", {"hysteresis": 2}
    first, second = dynamic(**options), dynamic(**options)
    head = scales(first, outcomes[:stop])
    second.load_state_dict(first.state_dict())
    assert head + scales(second, outcomes[stop:]) == scales(dynamic(**options), outcomes)


def fp16(**changed):
    return SimpleNamespace(
        **{
            "loss_scale": 0,
            "initial_scale_power": 16,
            "loss_scale_window": 1000,
            "hysteresis": 2,
            "consecutive_hysteresis": False,
            "min_loss_scale": 1,
            **changed,
        }
    )


def test_the_section_decides():
    assert create_loss_scaler(fp16(), enabled=True).scale == 65536
    assert create_loss_scaler(fp16(initial_scale_power=4), enabled=True).scale == 16
    static = create_loss_scaler(fp16(loss_scale=128), enabled=True)
    assert (static.scale, static.dynamic) == (128, False)
    off = create_loss_scaler(fp16(), enabled=False)
    assert (off.scale, off.dynamic) == (1, False)


@pytest.mark.parametrize(
    ("key", "value", "outcomes"),
    [
        ("loss_scale_window", 2, ".."),
        ("hysteresis", 1, "o"),
        ("consecutive_hysteresis", True, "o.o"),
        ("min_loss_scale", 2**16 - 1, "oo"),
        ("initial_scale_power", 8, "."),
    ],
)
def test_every_key_changes_the_scale(key, value, outcomes):
    usual = scales(create_loss_scaler(fp16(), enabled=True), outcomes)
    assert scales(create_loss_scaler(fp16(**{key: value}), enabled=True), outcomes) != usual


def test_a_static_scale_stays_as_configured_whatever_was_saved():
    scaler = StaticLossScaler(128.0)
    scaler.load_state_dict(DynamicLossScaler(2.0**10).state_dict())
    assert scaler.scale == 128


def test_a_dynamic_scale_continues_from_a_static_one():
    scaler = DynamicLossScaler(2.0**10)
    scaler.load_state_dict(StaticLossScaler(128.0).state_dict())
    assert scaler.scale == 128
