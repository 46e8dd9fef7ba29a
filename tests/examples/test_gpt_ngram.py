"""The counting models of the example against values worked out by hand."""

from __future__ import annotations

import math

import gpt_example  # noqa: F401
import numpy as np
import pytest
from gpt.ngram import ByteCounts, bits_per_byte

A, B, C = 97, 98, 99
COUNTS = ByteCounts.of(np.frombuffer(b"aabab", dtype=np.uint8))


def test_order0_is_count_plus_one_over_total_plus_256():
    chances = COUNTS.order0()
    assert chances[A] == pytest.approx(4 / 261)
    assert chances[B] == pytest.approx(3 / 261)
    assert chances[C] == pytest.approx(1 / 261)
    assert chances.sum() == pytest.approx(1)


def test_order1_leans_on_order0():
    chances = COUNTS.order1()  # pairs: aa 1, ab 2, ba 1
    assert chances[A, A] == pytest.approx((1 + 4 / 261) / 4)
    assert chances[A, B] == pytest.approx((2 + 3 / 261) / 4)
    assert chances[B, A] == pytest.approx((1 + 4 / 261) / 2)
    assert chances[C] == pytest.approx(COUNTS.order0())
    assert chances.sum(axis=1) == pytest.approx(np.ones(256))


def test_bits_are_the_mean_surprise_of_all_but_the_first_byte():
    windows = np.frombuffer(b"cab", dtype=np.uint8)[None]
    order0, order1 = bits_per_byte(COUNTS, windows)
    assert order0 == pytest.approx(-(math.log2(4 / 261) + math.log2(3 / 261)) / 2)
    assert order1 == pytest.approx(-(math.log2(4 / 261) + math.log2((2 + 3 / 261) / 4)) / 2)


def test_uniform_bytes_cost_eight_bits():
    data = np.tile(np.arange(256, dtype=np.uint8), 50)
    order0, _ = bits_per_byte(ByteCounts.of(data), data[None])
    assert order0 == pytest.approx(8)
