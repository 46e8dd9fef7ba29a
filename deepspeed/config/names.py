"""Which known key a misspelt one resembles."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Collection

SHORT = 10
"""Below this length a known key is matched only when one letter is wrong: ``msamp`` is not ``amp``."""

CLOSE = 2
"""Wrong letters up to which two keys are close."""

COMMON = 0.77
"""Share of letters in common from which long keys resemble each other: zero_optimizer, zero_optimization."""


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


def nearest(word: str, known: Collection[str], limit: int = 3) -> list[str]:
    """Return the known keys likest to `word`, at most `limit`: by wrong letters if few, else by parts."""
    word = word.lower()
    fewest = CLOSE
    alike: list[str] = []
    for name in known:
        if _letters_apart(word, name.lower()) > fewest:
            continue
        steps = distance(word, name.lower())
        if steps < fewest:
            fewest, alike = steps, []
        if steps == fewest:
            alike.append(name)
    if alike:
        return alike[:limit]
    ranked = sorted(((_ratio(word, name), name) for name in known), reverse=True)
    return [name for ratio, name in ranked if ratio > ranked[0][0] - 0.05][:limit]


def resembling(word: str, known: Collection[str]) -> list[str]:
    """Return the known keys that `word` is probably a misspelling of; empty when it resembles none.

    A leading ``_``, ``$``, ``/`` or ``#`` marks a comment and a dot marks another tool's dotted key.
    """
    if not word or word[0] in "_$/#" or "." in word:
        return []
    alike = [name for name in known if _alike(word.lower(), name)]
    return nearest(word, alike)


def _alike(word: str, name: str) -> bool:
    allowed = 1 if len(name) < SHORT else CLOSE
    if _letters_apart(word, name) <= allowed and distance(word, name) <= allowed:
        return True
    return len(name) >= SHORT and _ratio(word, name) >= COMMON


def _letters_apart(a: str, b: str) -> int:
    """Return a quick lower bound of `distance`: letters that one has and the other lacks."""
    left, right = Counter(a), Counter(b)
    return max((left - right).total(), (right - left).total())


def _ratio(a: str, b: str) -> float:
    matcher = difflib.SequenceMatcher(None, a, b, autojunk=False)
    return matcher.ratio() if matcher.quick_ratio() >= 0.5 else 0.0


def did_you_mean(names: list[str]) -> str:
    """Return ``did you mean 'a' or 'b'?``."""
    return f"did you mean {' or '.join(map(repr, names))}?"
