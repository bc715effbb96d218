"""What an experiment measured, and which of its bounds did not hold."""

from __future__ import annotations

import json
from typing import Any


class BrokenError(Exception):
    """The experiment cannot go on: a process ended that should not have, or nothing moves."""


class Report:
    """One line of JSON in the making.

    Args:
        experiment: Its name.
        timed: Whether times are judged. The short form of an experiment is a test, which holds on
            any machine, however slow or busy.
    """

    def __init__(self, experiment: str, timed: bool = True) -> None:
        self._timed = timed
        self._numbers: dict[str, Any] = {"experiment": experiment}
        self.broken: list[str] = []

    def note(self, **numbers: Any) -> None:
        self._numbers |= numbers

    def require(self, holds: bool, bound: str) -> None:
        """Notes a bound that did not hold; the experiment goes on."""
        if not holds:
            self.broken.append(bound)

    def require_in_time(self, holds: bool, bound: str) -> None:
        """Notes a bound on a time that did not hold, if times are judged."""
        self.require(holds or not self._timed, bound)

    def line(self) -> str:
        return json.dumps({**self._numbers, "ok": not self.broken, "broken": self.broken})


def percentile(values: list[float], share: float) -> float:
    """The smallest value that at least this share of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-int(share * 1000) * len(ordered) // 1000) - 1)]
