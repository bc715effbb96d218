"""What training runs wrote, while they run and at their end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.chaos.report import Report

# Of a step, what does not depend on how long it took or on what was sent twice.
_EXACT = ("step", "loss", "grad_norm", "lr", "tokens")


class MetricsTail:
    """Follows a ``metrics.jsonl``, which a resumed run cuts back to its checkpoint.

    Args:
        path: The file; may not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, ...] = ()
        self._lines: list[str] = []
        self.last_step = 0
        self.written = 0
        """Lines so far, those of repeated steps too."""

    def look(self) -> list[dict[str, Any]]:
        """Returns the lines written since the last look."""
        try:
            now = self._path.stat()
        except FileNotFoundError:
            return []
        if (state := (now.st_ino, now.st_size, now.st_mtime_ns)) == self._seen:
            return []
        self._seen = state
        # A line that a kill or this look cut in two is not written yet.
        lines = self._path.read_text(encoding="utf-8").split("\n")[:-1]
        kept = next(
            (i for i, (a, b) in enumerate(zip(lines, self._lines, strict=False)) if a != b),
            min(len(lines), len(self._lines)),
        )
        self._lines = lines
        new = [json.loads(line) for line in lines[kept:]]
        self.written += len(new)
        if lines:
            self.last_step = json.loads(lines[-1])["step"]
        return new

    def lines(self) -> list[dict[str, Any]]:
        """All that is in the file."""
        self.look()
        return [json.loads(line) for line in self._lines]


def require_same_run(report: Report, reference: Path, found: Path) -> None:
    """Requires that two finished runs are the same, bit for bit.

    Args:
        report: Takes what is not.
        reference: Output folder of the undisturbed run.
        found: Output folder of the other.
    """
    expected, steps = _steps(reference), _steps(found)
    numbers = [s["step"] for s in steps]
    report.require(
        numbers == [s["step"] for s in expected],
        f"{found.name}: metrics.jsonl has {len(steps)} lines, the last of step "
        f"{numbers[-1] if numbers else None}; each of {len(expected)} steps belongs there once",
    )
    other = [
        s["step"]
        for s, e in zip(steps, expected, strict=False)
        if any(s[key] != e[key] for key in _EXACT)
    ]
    report.require(not other, f"{found.name}: {len(other)} steps differ, the first {other[:1]}")
    _require_same_adapter(report, reference, found)


def _require_same_adapter(report: Report, reference: Path, found: Path) -> None:
    path = Path("adapter/adapter_model.safetensors")
    expected, weights = load_file(reference / path), load_file(found / path)
    report.require(expected.keys() == weights.keys(), f"{found.name}: other adapter weights")
    differ = [
        name
        for name in expected.keys() & weights.keys()
        if not _same_bits(expected[name], weights[name])
    ]
    report.require(
        not differ,
        f"{found.name}: {len(differ)} of {len(expected)} adapter tensors differ, {differ[:1]}",
    )


def _same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    same_form = first.dtype == second.dtype and first.shape == second.shape
    return same_form and torch.equal(first.view(torch.uint8), second.view(torch.uint8))


def _steps(out: Path) -> list[dict[str, Any]]:
    text = (out / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]
