"""What a benchmark found: rows of figures, and claims with their bounds."""

from __future__ import annotations

import argparse
import logging
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Spread:
    """A figure that was taken several times."""

    median: float
    least: float
    most: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values), len(values))

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.least:.3g} to {self.most:.3g}, n={self.count})"


@dataclass(frozen=True)
class Claim:
    """A bound that a figure should keep."""

    text: str
    value: float
    bound: float
    at_most: bool = True

    @property
    def held(self) -> bool:
        return self.value <= self.bound if self.at_most else self.value >= self.bound

    def __str__(self) -> str:
        sign = "≤" if self.at_most else "≥"
        return f"{self.text}: {self.value:.3g} ({sign} {self.bound:.4g})"


@dataclass
class Section:
    """One benchmark's findings."""

    name: str
    title: str
    rows: list[Row] = field(default_factory=list)
    """Every row has the same keys: the columns of the table."""
    claims: list[Claim] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        rows = [
            {k: asdict(v) if isinstance(v, Spread) else v for k, v in r.items()} for r in self.rows
        ]
        claims = [asdict(c) | {"held": c.held} for c in self.claims]
        return {"title": self.title, "rows": rows, "claims": claims, "notes": self.notes}

    def as_markdown(self) -> str:
        lines = [f"## {self.title}", ""]
        if self.rows:
            columns = list(self.rows[0])
            lines += [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
            lines += [f"| {' | '.join(_cell(row[c]) for c in columns)} |" for row in self.rows]
            lines.append("")
        lines += [f"- {'held' if c.held else '**not held**'}: {c}" for c in self.claims]
        lines += [f"- {note}" for note in self.notes]
        return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def log_sections(sections: Sequence[Section]) -> None:
    """Shows what was found, as Markdown."""
    for section in sections:
        logging.getLogger("benchmarks").info("%s", section.as_markdown())


def run_alone(measure: Callable[[bool], list[Section]], description: str | None) -> None:
    """Runs one benchmark from the command line and shows what it found."""
    logging.basicConfig(level="INFO", format="%(message)s")
    arguments = argparse.ArgumentParser(description=description)
    arguments.add_argument("--quick", action="store_true", help="less often, to see that it runs")
    log_sections(measure(arguments.parse_args().quick))
