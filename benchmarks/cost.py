"""What it costs that every parameter is at the client: a step beside that of the tree before.

The tree of the commit before (``BEFORE``) had half of the adapter and its optimizer on the trunk.
Both run in processes of their own, with the same libraries, and step in turn.
"""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from benchmarks import cost_side
from benchmarks.cost_side import BATCH, SPLIT, TOKENS
from benchmarks.gpt2_small import WIDTH, adapted, gpt2_small
from benchmarks.processes import cpu_seconds, trunk_processes
from benchmarks.report import Claim, Row, Section, Spread, run_alone

LOG = logging.getLogger("benchmarks")
ROOT = Path(__file__).parents[1]
BEFORE = "3fe214a"
"""The last commit whose trunk had an optimizer."""
TITLE = f"A training step, every parameter at the client ÷ {BEFORE}"
THREADS, PAIRS, WATCHED = 2, 15, 5
MICRO = (1, 4)
FLOAT = HOPS = 4
CPU_BOUND, WALL_BOUND, COMPARED_BOUND, LOSS_BOUND = 1.05, 1.07, 0.002, 1e-5
BYTES_BOUND = 1.01
"""Of the formula; the rest are small fields, masks and names."""


@dataclass(frozen=True)
class Step:
    """What one step took."""

    seconds: float
    client_s: float
    trunk_s: float
    """CPU, user and system."""
    loss: float
    sent: int
    received: int
    compared_s: float
    described_s: float

    @property
    def cpu_s(self) -> float:
        return self.client_s + self.trunk_s


class Side:
    """A process with a split model, and its trunk."""

    def __init__(self, tree: Path, model: Path, adapter: Path) -> None:
        environment = os.environ | {
            "PYTHONPATH": str(tree),
            "HF_HUB_OFFLINE": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "OMP_NUM_THREADS": str(THREADS),
        }
        # -P: or this folder would come before the tree.
        command = [sys.executable, "-P", cost_side.__file__, str(model), str(adapter)]
        self._process = subprocess.Popen(
            [*command, str(THREADS)],
            cwd=tree,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        ready = self._answer()
        assert Path(ready["tree"]).is_relative_to(tree), ready
        self.parameters: int = ready["parameters"]
        self._trunk = trunk_processes(self._process.pid)[0].pid

    def step(self, seed: int, micro: int = 1, watch: bool = False) -> Step:
        """One step; from ``watch`` on, its comparisons are timed."""
        before = self._cpu()
        assert self._process.stdin is not None
        order = {"seed": seed, "micro": micro, "watch": watch}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        found = self._answer()
        client_s, trunk_s = (b - a for a, b in zip(before, self._cpu(), strict=True))
        return Step(
            found["seconds"],
            client_s,
            trunk_s,
            found["loss"],
            found["sent"],
            found["received"],
            found["compared"],
            found["described"],
        )

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def _cpu(self) -> tuple[float, float]:
        trunk = cpu_seconds(self._trunk)
        return cpu_seconds(self._process.pid) - trunk, trunk

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a side ended ({self._process.wait(60)}); see what it said above")
        found: dict[str, Any] = json.loads(line)
        return found


def tree_before() -> bytes:
    """The files of the commit before, as a tar archive; empty if git does not have it here."""
    command = ["git", "-C", str(ROOT), "archive", BEFORE]
    try:
        return subprocess.run(command, check=True, capture_output=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return b""


@contextmanager
def both_sides(archived: bytes) -> Iterator[tuple[Side, Side]]:
    """A model of the tree before and one of today's, from the same adapter."""
    with tempfile.TemporaryDirectory() as scratch:
        tree, model, adapter = (Path(scratch) / name for name in ("tree", "model", "adapter"))
        with tarfile.open(fileobj=io.BytesIO(archived)) as files:
            files.extractall(tree, filter="data")
        gpt2_small(model)
        adapted(AutoModelForCausalLM.from_pretrained(model)).save_pretrained(adapter)
        sides: list[Side] = []
        try:
            for root in (tree, ROOT):
                sides.append(Side(root, model, adapter))
            yield sides[0], sides[1]
        finally:
            for side in sides:
                side.close()


def measure(quick: bool = False) -> list[Section]:
    """A step of both trees in turn, its bytes, and the share of comparing."""
    pairs, archived = 3 if quick else PAIRS, tree_before()
    if not archived:
        return [Section("cost", TITLE, notes=[f"Not measured: git has no {BEFORE} here."])]
    with both_sides(archived) as (before, today):
        sides = {"before": before, "today": today}
        found: dict[str, list[Step]] = {name: [] for name in sides}
        losses: dict[str, list[float]] = {name: [] for name in sides}
        for pair in range(1 + pairs):
            for name in sorted(sides, reverse=bool(pair % 2)):
                # Of two steps the second counts: the other side's turn left caches cold.
                steps = [sides[name].step(2 * pair + n) for n in range(2)]
                losses[name] += [step.loss for step in steps]
                found[name] += steps[1:] if pair else []
                LOG.info("%d %s: %.2f s, CPU %.2f s", pair, name, steps[1].seconds, steps[1].cpu_s)
        bytes_of = {k: [side.step(10_000 + k, k) for side in sides.values()] for k in MICRO}
        watched = [today.step(20_000 + n, watch=n == 0) for n in range(WATCHED)]
        parameters = today.parameters
    apart = max(abs(a - b) for a, b in zip(*losses.values(), strict=True))
    return [_time(found, apart), _bytes(bytes_of, parameters), _compared(watched)]


def _time(found: dict[str, list[Step]], loss_difference: float) -> Section:
    section = Section("cost", TITLE)
    for name, steps in found.items():
        section.rows.append(
            {
                "tree": name,
                "step s": Spread.of([s.seconds for s in steps]),
                "CPU s": Spread.of([s.cpu_s for s in steps]),
                "client CPU s": Spread.of([s.client_s for s in steps]),
                "trunk CPU s": Spread.of([s.trunk_s for s in steps]),
            }
        )
    pairs = list(zip(found["today"], found["before"], strict=True))
    ratios: Row = {"tree": "today ÷ before, by pairs"}
    ratios["step s"] = Spread.of([a.seconds / b.seconds for a, b in pairs])
    ratios["CPU s"] = Spread.of([a.cpu_s / b.cpu_s for a, b in pairs])
    ratios["client CPU s"] = Spread.of([a.client_s / b.client_s for a, b in pairs])
    ratios["trunk CPU s"] = Spread.of([a.trunk_s / b.trunk_s for a, b in pairs])
    section.rows.append(ratios)
    section.claims = [
        Claim("CPU, client and trunk, median of the pairs", ratios["CPU s"].median, CPU_BOUND),
        Claim("wall, median of the pairs", ratios["step s"].median, WALL_BOUND),
        Claim("largest difference of a loss", loss_difference, LOSS_BOUND),
    ]
    section.notes = [
        f"GPT-2 small's size, split {SPLIT}, LoRA r=8 on all linear layers, AdamW, {BATCH}x{TOKENS}"
        f" tokens, float32, {THREADS} threads a side. Turns of two steps, of which the second "
        f"counts; n={len(pairs)} pairs after one to warm up. What else the machine does falls on "
        "both.",
    ]
    return section


def _bytes(found: dict[int, list[Step]], parameters: int) -> Section:
    section = Section("cost_bytes", "Bytes of a training step")
    hops = HOPS * FLOAT * BATCH * TOKENS * WIDTH
    for k, (before, today) in found.items():
        expected = hops + FLOAT * parameters * (1 + k)
        total = today.sent + today.received
        section.rows.append(
            {
                "micro-batches (backwards)": k,
                "before, up": before.sent,
                "before, down": before.received,
                "today, up": today.sent,
                "today, down": today.received,
                "hops + 4 P (1 + k)": expected,
            }
        )
        text = f"{k} backwards: bytes ÷ (hops + 4 up + 4·{k} down a parameter)"
        section.claims.append(Claim(text, total / expected, BYTES_BOUND))
    section.notes = [
        f"As gRPC is given them. P: {parameters:,} adapter parameters in the trunk's blocks; hops: "
        f"{hops:,} bytes of hidden states and gradients. Before, every eighth step or so fetched a "
        "snapshot besides: three times the adapter.",
    ]
    return section


def _compared(watched: list[Step]) -> Section:
    section = Section("cost_compared", "Finding what has changed, of a step's CPU")
    shares = Spread.of([s.compared_s / s.cpu_s for s in watched])
    section.rows = [
        {
            "comparing contents, ms": Spread.of([1e3 * s.compared_s for s in watched]),
            "share": shares,
            "reading PEFT's layers, ms": Spread.of([1e3 * s.described_s for s in watched]),
            "its share": Spread.of([s.described_s / s.cpu_s for s in watched]),
        }
    ]
    section.claims = [Claim("comparing contents, share of CPU", shares.median, COMPARED_BOUND)]
    section.notes = ["CPU seconds of the client inside these calls; forward and backward together."]
    return section


if __name__ == "__main__":
    run_alone(measure, __doc__)
