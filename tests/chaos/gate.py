"""Where a process waits until the experiment lets it go on, alive and in touch with its trunk.

A stopped process would answer no pings, and its trunk would take it for dead.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

VARIABLE = "CHAOS_GATE"
"""Of the environment: the file of the gate that a process is to pass."""

_LOOK_S = 0.01


class Gate:
    """A number in a file: how far a process may go. Open while there is no file.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pause = threading.Event()

    def close_after(self, number: int) -> None:
        """Lets the process go as far as this."""
        temporary = self.path.with_name(f"{self.path.name}.new")
        temporary.write_text(str(number), encoding="utf-8")
        temporary.replace(self.path)

    def open(self) -> None:
        """Lets the process go as far as it wants to."""
        self.path.unlink(missing_ok=True)

    def wait(self, number: int) -> None:
        """Waits, in the process, until it may go as far as this."""
        while (allowed := self._allowed()) is not None and allowed < number:
            self._pause.wait(_LOOK_S)

    def _allowed(self) -> int | None:
        try:
            return int(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None


def one_by_one(gate: Gate, steps: Iterable[Any]) -> Iterator[Any]:
    """Passes a training run's steps on, and begins each when it may."""
    gate.wait(1)
    for step in steps:
        yield step
        gate.wait(step.step + 1)
