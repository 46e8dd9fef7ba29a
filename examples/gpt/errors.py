"""The one exception of the example: a sentence for the user, never a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Something the user gave cannot be used; the text says what, and what to do instead."""
