"""Timers add up what they were asked to measure."""

import pytest

from deepspeed.common import timers as module
from deepspeed.common.timers import SynchronizedWallClockTimer, ThroughputTimer, Timer
from deepspeed.errors import UsageError


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test moves by hand, in seconds."""
    now = [100.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])

    def advance(seconds):
        now[0] += seconds

    return advance


def lap(timer, clock, seconds, **options):
    timer.start()
    clock(seconds)
    timer.stop(**options)


def test_intervals_add_up_in_milliseconds_until_they_are_read(clock):
    timer = Timer("forward")
    lap(timer, clock, 0.5)
    clock(9)
    lap(timer, clock, 0.25)
    assert timer.elapsed(reset=False) == pytest.approx(750)
    assert timer.elapsed() == pytest.approx(750)
    assert timer.elapsed() == 0


def test_a_running_timer_can_be_read(clock):
    timer = Timer("forward")
    timer.start()
    clock(1)
    assert timer.elapsed() == pytest.approx(1000)
    clock(2)
    timer.stop()
    assert timer.elapsed() == pytest.approx(2000)


def test_recorded_intervals_have_a_mean(clock):
    timers = SynchronizedWallClockTimer()
    for seconds in (1, 3):
        lap(timers("step"), clock, seconds, record=True)
    assert timers("step").mean() == pytest.approx(2000)
    assert timers.get_mean(["step", "absent"], normalizer=2) == {"step": pytest.approx(1000)}
    assert timers.get_timers()["step"].mean() == 0
    lap(timers("step"), clock, 4)
    lap(timers("step"), clock, 1, reset=True)
    assert timers("step").elapsed() == pytest.approx(1000)


def test_start_and_stop_must_alternate():
    timer = Timer("step")
    with pytest.raises(UsageError, match="timer 'step': expected start before stop"):
        timer.stop()
    timer.start()
    with pytest.raises(UsageError, match="expected stop before another start"):
        timer.start()


def test_log_prints_the_named_timers(clock, capfd):
    timers = SynchronizedWallClockTimer()
    lap(timers("forward"), clock, 0.5)
    timers.log(["forward", "absent"], normalizer=2, memory_breakdown=True)
    assert "time (ms) | forward: 250.00 | memory" in capfd.readouterr().err


def test_throughput_leaves_out_the_warm_up(clock):
    lines = []
    timer = ThroughputTimer(batch_size=32, start_step=1, steps_per_output=2, logging_fn=lines.append)
    assert timer.avg_samples_per_sec() == 0
    for seconds in (100, 1, 3):
        for micro_step in range(2):
            timer.start()
            clock(seconds / 2)
            timer.stop(global_step=micro_step == 1)
    timer.stop(global_step=True)
    assert timer.avg_samples_per_sec() == pytest.approx(16)
    assert lines == ["step 2: 32.00 samples/s"]
