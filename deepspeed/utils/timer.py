"""The timers under the path scripts import them from."""

from deepspeed.common.timers import SynchronizedWallClockTimer, ThroughputTimer, Timer

__all__ = ["SynchronizedWallClockTimer", "ThroughputTimer", "Timer"]
