"""Which known key a misspelt one resembles."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable

SHORT = 10
"""Below this length a known key is matched only when one letter is wrong: ``msamp`` is not ``amp``."""


def distance(a: str, b: str) -> int:
    """Return how many letters must be changed, added, dropped or swapped with a neighbour."""
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row = row, [i]
        for j, y in enumerate(b, 1):
            cost = min(previous[j] + 1, row[j - 1] + 1, previous[j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                cost = min(cost, before[j - 2] + 1)
            row.append(cost)
        before = previous
    return row[-1]


def nearest(word: str, known: Iterable[str], limit: int = 3) -> list[str]:
    """Return the known keys at the smallest distance from `word`, at most `limit`, likeliest first."""
    ranked = sorted((distance(word.lower(), name.lower()), -_ratio(word, name), name) for name in known)
    return [name for steps, _, name in ranked if steps == ranked[0][0]][:limit]


def resembling(word: str, known: Collection[str]) -> list[str]:
    """Return the known keys that `word` is probably a misspelling of; empty when it resembles none.

    A leading ``_``, ``$``, ``/`` or ``#`` marks a comment and a dot marks another tool's dotted key.
    """
    if not word or word[0] in "_$/#" or "." in word:
        return []
    alike = [name for name in known if _alike(word.lower(), name)]
    return nearest(word, alike)


def _alike(word: str, name: str) -> bool:
    if len(name) < SHORT:
        return distance(word, name) <= 1
    return _ratio(word, name) >= 0.8 or distance(word, name) <= 2


def _ratio(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b, autojunk=False).ratio()


def did_you_mean(names: list[str]) -> str:
    """Return ``did you mean 'a' or 'b'?``."""
    return f"did you mean {' or '.join(map(repr, names))}?"
