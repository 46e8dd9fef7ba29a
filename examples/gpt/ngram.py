"""Two models that only count bytes: what a trained model has to beat to have learned anything.

order 0:  p(b)     = (count(b) + 1) / (total + 256)
order 1:  p(b | a) = (count(a, b) + p(b)) / (count(a) + 1)          leans on order 0 where `a` is rare
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BYTES = 256


@dataclass(frozen=True)
class ByteCounts:
    """Counts of the training bytes: single ones (256) and pairs (256, 256)."""

    single: np.ndarray
    pairs: np.ndarray

    @classmethod
    def of(cls, data: np.ndarray) -> ByteCounts:
        """Count `data` (uint8, one dimension)."""
        joined = data[:-1].astype(np.int64) * BYTES + data[1:]
        pairs = np.bincount(joined, minlength=BYTES * BYTES).reshape(BYTES, BYTES)
        return cls(np.bincount(data, minlength=BYTES), pairs)

    def order0(self) -> np.ndarray:
        """Return p(b), float64 of shape (256,)."""
        chances: np.ndarray = (self.single + 1) / (self.single.sum() + BYTES)
        return chances

    def order1(self) -> np.ndarray:
        """Return p(b | a), float64 of shape (256, 256), row `a`."""
        chances: np.ndarray = (self.pairs + self.order0()) / (self.pairs.sum(axis=1, keepdims=True) + 1)
        return chances


def bits_per_byte(counts: ByteCounts, windows: np.ndarray) -> tuple[float, float]:
    """Score windows (any number, length) under order 0 and order 1; each one's first byte is context only."""
    before, after = windows[:, :-1], windows[:, 1:]
    order0 = -np.log2(counts.order0()[after]).mean()
    order1 = -np.log2(counts.order1()[before, after]).mean()
    return float(order0), float(order1)
