"""What is gathered: how much now, at most, and how often."""

from __future__ import annotations


class GatherMeter:
    """Count what units gather and release.

    Attributes:
        numel: elements gathered now.
        nbytes: bytes gathered now.
        peak_numel: most elements gathered at once.
        peak_nbytes: most bytes gathered at once.
        gathers: gathers of units so far.
    """

    def __init__(self) -> None:
        self.numel = self.nbytes = self.peak_numel = self.peak_nbytes = self.gathers = 0

    def gathered(self, numel: int, itemsize: int) -> None:
        """Count a unit that was gathered."""
        self.gathers += 1
        self.numel += numel
        self.nbytes += numel * itemsize
        self.peak_numel = max(self.peak_numel, self.numel)
        self.peak_nbytes = max(self.peak_nbytes, self.nbytes)

    def released(self, numel: int, itemsize: int) -> None:
        """Count a unit that was released."""
        self.numel -= numel
        self.nbytes -= numel * itemsize
