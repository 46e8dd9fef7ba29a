"""Where each value of a configuration came from, and what "auto" became."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Provenance:
    """By canonical path: given by the user, left to us with "auto", or set by the program."""

    user: set[str] = field(default_factory=set)
    auto: dict[str, str | None] = field(default_factory=dict)
    """Path -> why it got its value; None while unresolved."""
    chosen: dict[str, str] = field(default_factory=dict)
    """Path -> who set it, for values neither the user nor "auto" brought."""
    spelled: dict[str, str] = field(default_factory=dict)
    """Canonical path -> the spelling the user wrote."""
    announced: set[str] = field(default_factory=set)

    def source_of(self, path: str) -> str:
        """Return ``user``, ``user (as OLD)``, ``auto``, ``auto: WHY``, ``default`` or who set it."""
        if path in self.chosen:
            return self.chosen[path]
        if path in self.auto:
            reason = self.auto[path]
            return "auto" if reason is None else f"auto: {reason}"
        if path in self.spelled:
            return f"user (as {self.spelled[path]})"
        return "user" if path in self.user else "default"

    def unresolved(self) -> list[str]:
        """Return the "auto" paths that have no value yet."""
        return [path for path, reason in self.auto.items() if reason is None]

    def fresh(self) -> list[str]:
        """Return the "auto" paths resolved since the last call."""
        new = [
            path for path, reason in self.auto.items() if reason is not None and path not in self.announced
        ]
        self.announced.update(new)
        return new
