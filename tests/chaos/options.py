"""How much of an experiment is run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """From the command line; None is the experiment's own default."""

    short: bool = False
    seed: int = 0
    kills: int | None = None
    steps: int | None = None
    cycles: int | None = None
