"""A layout places every element of every parameter once."""

import pytest

from deepspeed.zero.layout import ALIGN, even_layout, whole_layout

NUMELS = [[1], [0], [0, 1, 5], [33, 64, 7, 100, 1], [4096, 3, 0, 77], [1] * 50]


@pytest.mark.parametrize("make", [even_layout, whole_layout])
@pytest.mark.parametrize("numels", NUMELS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_pieces_and_gaps_cover_the_flat_exactly_once(make, numels, ranks):
    layout = make(numels, ranks)
    owners = [[] for _ in range(layout.total)]
    covered = {index: set() for index in range(len(numels))}
    for rank in range(ranks):
        for piece in layout.pieces(rank):
            covered[piece.index] |= set(range(piece.param_start, piece.param_stop))
            for position in range(piece.shard_start, piece.shard_stop):
                owners[rank * layout.chunk + position].append(piece.index)
    for start, stop in layout.gaps:
        for position in range(start, stop):
            owners[position].append("gap")
    assert all(len(owner) == 1 for owner in owners)
    assert covered == {index: set(range(numel)) for index, numel in enumerate(numels)}


@pytest.mark.parametrize("numels", NUMELS)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_shards_are_equal_and_aligned(numels, ranks):
    layout = even_layout(numels, ranks)
    assert layout.chunk % ALIGN == 0
    assert all(offset % ALIGN == 0 for offset in layout.offsets)
    assert layout.total < sum(numels) + ALIGN * (len(numels) + ranks + 1)


@pytest.mark.parametrize("numels", NUMELS)
@pytest.mark.parametrize("ranks", [2, 3])
def test_whole_layout_never_cuts_a_parameter(numels, ranks):
    layout = whole_layout(numels, ranks)
    pieces = [piece for rank in range(ranks) for piece in layout.pieces(rank)]
    assert sorted(piece.index for piece in pieces) == [i for i, numel in enumerate(numels) if numel]
    assert all(piece.numel == numels[piece.index] for piece in pieces)


def test_whole_layout_balances_ranks():
    layout = whole_layout([64] * 10, 3)
    assert layout.chunk == 64 * 4
