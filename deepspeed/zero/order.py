"""In which order units are used, as seen in the last pass: what to gather ahead, and what to keep.

A pass is one forward and its backward (or a forward alone, without gradients). The order of the last pass is
a guess about this one. A wrong guess costs time, never a result: whatever is needed is gathered when it is.
"""

from __future__ import annotations

from collections.abc import Iterator

from deepspeed.zero.unit import Unit

Use = tuple[Unit, bool]
"""A unit, and whether backward uses it."""

FAR = 2**62
"""Distance to a use that is not expected."""


class UseOrder:
    """The uses of units in this pass, beside those of the last one."""

    def __init__(self) -> None:
        self._seen: list[Use] = []
        self._expected: list[Use] = []
        self._next = 0

    def begin_pass(self) -> None:
        """Make the uses seen so far the expectation."""
        if self._seen:
            self._expected = self._seen
        self._seen = []
        self._next = 0

    def used(self, unit: Unit, in_backward: bool) -> bool:
        """Note a use; return whether it is a new one: several in a row are one."""
        use = (unit, in_backward)
        if self._seen and self._seen[-1] == use:
            return False
        self._seen.append(use)
        for position in range(self._next, len(self._expected)):
            if self._expected[position] == use:
                self._next = position + 1
                break
        return True

    def upcoming(self) -> Iterator[Unit]:
        """Yield the units expected next, a unit for each of its uses."""
        for unit, _ in self._expected[self._next :]:
            yield unit

    def distance(self, unit: Unit) -> int:
        """Return how many elements are expected to be used before `unit` is again; FAR if it is not."""
        passed = 0
        for other in self.upcoming():
            if other is unit:
                return passed
            passed += other.layout.total
        return FAR
