"""The exceptions a user can meet, drawn as a tree.

    DeepSpeedError
    ├── ConfigError           a key or argument is wrong (also a ValueError)
    │   └── NotBuiltError     the key is known, its feature is not part of this release
    ├── UsageError            a call at the wrong moment or with the wrong object (also a RuntimeError)
    │   └── LossScaleError    fp16 cannot go on: the loss scale is at its minimum
    ├── OffloadError          states cannot live where they were sent: disk or host memory (also a RuntimeError)
    ├── CheckpointError       saved state is damaged or incomplete, or cannot be written (also a RuntimeError)
    ├── CommunicationError    ranks cannot talk, or do not agree (also a RuntimeError)
    └── LaunchError           the launcher cannot start, or a rank failed (also a RuntimeError)

Every message names the key or argument, the value, what is allowed and the way out, in that order:
``zero_optimization.stage: expected 0, 1, 2 or 3, got 4``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DeepSpeedError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(DeepSpeedError, ValueError):
    """A configuration key or an argument has a value that cannot be used."""


class NotBuiltError(ConfigError):
    """A key asks for a feature that this release does not have."""


class UsageError(DeepSpeedError, RuntimeError):
    """A call came at the wrong moment or with the wrong object."""


class LossScaleError(UsageError):
    """The dynamic loss scale is at its minimum and gradients still overflow."""


class OffloadError(DeepSpeedError, RuntimeError):
    """States cannot be kept on disk or in host memory: full, missing, not writable, cut short, failing."""


class CheckpointError(DeepSpeedError, RuntimeError):
    """Saved state cannot be written, or is damaged or incomplete."""


class CommunicationError(DeepSpeedError, RuntimeError):
    """Ranks cannot communicate, or do not agree on what to do."""


class LaunchError(DeepSpeedError, RuntimeError):
    """Ranks could not be started, or one of them failed."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the known name nearest to `word`, or an empty string."""
    nearest = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {nearest[0]!r}?)" if nearest else ""
