"""The trunk's memory: of one more tenant, of a forward that waits for its backward, and later.

Resident memory of the daemon's process is what is measured, once it was idle for long enough to
give freed memory back; what the trunk itself accounts for stands beside it.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import psutil
import torch

from benchmarks.gpt2_small import LAYERS_ON_TRUNK, SPLIT, WIDTH, gpt2_small, lora
from benchmarks.peers.driving import adamw
from benchmarks.processes import MIB, trunk_processes
from benchmarks.report import Claim, Row, Section, run_alone
from client_service.local_trunk import local_trunk
from client_service.training_client import TrainingClient
from trunk_service.settings import TrunkSettings

LOG = logging.getLogger("memory")

BATCH, TOKENS = 4, 128
TENANTS = (1, 2, 4, 8, 16, 32, 64)
STEPS_EACH, STEP_PAIRS, ROUNDS = 2, 7, 5
HELD = {"retained": (1, 4)}
MANY_HELD = (4, 16)
LEFT_MIB = 20.0
TENSORS_BOUND, RESIDENT_MB = 1.1, 2.5
"""Tensors of one more tenant, of its adapter; resident memory beyond it."""
RETURN_AFTER_S = "1"  # 30 by default; what goes back is the same
IDLE_S = 8.0
KIB = 1024


@dataclass(frozen=True)
class Daemon:
    """A trunk's process."""

    address: str
    process: psutil.Process
    metrics: str
    counted: Path
    """Where it writes what it counts."""

    def rss(self) -> int:
        """Resident bytes once it was idle for long enough to give freed memory back."""
        time.sleep(IDLE_S)
        return int(self.process.memory_info().rss)

    def tensor_bytes(self) -> int:
        """Bytes of all tensors that are alive in it."""
        self.counted.unlink(missing_ok=True)
        self.process.send_signal(signal.SIGUSR1)
        while not self.counted.exists():
            self.process.status()  # raises once it has ended
            time.sleep(0.05)
        return int(self.counted.read_text(encoding="utf-8"))

    def accounted(self) -> float:
        """Bytes that the trunk says are held for backward."""
        with urllib.request.urlopen(f"http://{self.metrics}/metrics", timeout=5) as page:
            text = page.read().decode()
        found = re.findall(r"^trunkline_held_bytes\{.*\} (\S+)$", text, re.MULTILINE)
        return sum(map(float, found))


@contextmanager
def daemon(model: str, *flags: str) -> Iterator[Daemon]:
    """Starts a trunk that shows what it holds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        metrics = f"127.0.0.1:{free.getsockname()[1]}"
    before = {process.pid for process in trunk_processes()}
    flags = ("--metrics", metrics, "--return-memory-after-s", RETURN_AFTER_S, *flags)
    with tempfile.TemporaryDirectory() as scratch:
        counted = Path(scratch) / "counted"
        os.environ["COUNTED_BYTES"] = str(counted)
        module = "benchmarks.counted_trunk_service"
        with local_trunk(model, SPLIT, flags=flags, module=module) as address:
            process = next(p for p in trunk_processes() if p.pid not in before)
            yield Daemon(address, process, metrics, counted)


class Trainee:
    """A client that trains its adapter of the trunk's blocks."""

    def __init__(self, client: TrainingClient) -> None:
        self.client = client
        self._optimizer = adamw(client.parameters())

    def step(self, batch: int = BATCH) -> float:
        """One step on random hidden states; returns its seconds."""
        hidden_BTD = torch.randn(batch, TOKENS, WIDTH)
        started = time.perf_counter()
        self.client.forward(hidden_BTD)
        self.client.backward(torch.randn_like(hidden_BTD) / hidden_BTD.numel())
        self._optimizer.step()
        self._optimizer.zero_grad()
        return time.perf_counter() - started


def tenants(model: str, counts: tuple[int, ...]) -> Section:
    """Memory with more and more tenants that have trained and are idle."""
    section = Section("memory_tenants", "Memory of one more tenant on the trunk")
    found: dict[int, tuple[int, int]] = {}
    first, last = counts[0], counts[-1]
    with daemon(model) as trunk, ExitStack() as stack:
        alone = trunk.rss(), trunk.tensor_bytes()
        for number in range(1, last + 1):
            client = stack.enter_context(TrainingClient(trunk.address, lora(), seed=number))
            trainee = Trainee(client)
            for _ in range(STEPS_EACH):
                trainee.step(batch=1)
            if number in counts:
                found[number] = trunk.rss(), trunk.tensor_bytes()
        adapter = sum(p.nbytes for p in client.parameters())
    for number, (resident, tensors) in found.items():
        row: Row = {"tenants": number, "adapters, MB": number * adapter / 1e6}
        row["resident beyond none, MB"] = (resident - alone[0]) / 1e6
        row["tensors beyond none, MB"] = (tensors - alone[1]) / 1e6
        section.rows.append(row)
    resident, tensors = (
        (after - before) / (last - first)
        for before, after in zip(found[first], found[last], strict=True)
    )
    one = f"one more tenant, from {first} to {last}"
    of = f"its adapter ({adapter / 1e6:.2f} MB)"
    section.claims += [
        Claim(f"{one}: tensors, of {of}", tensors / adapter, TENSORS_BOUND),
        Claim(f"{one}: resident MB beyond {of}", (resident - adapter) / 1e6, RESIDENT_MB),
    ]
    section.notes = [
        f"LoRA r=8, {STEPS_EACH} steps of 1x{TOKENS} tokens each, then idle; the optimizer is the "
        "client's. Tensors: all that Python reaches in the daemon, shared memory once; the first "
        "tenant makes the base weights be seen.",
    ]
    return section


def modes(scratch: Path) -> dict[str, tuple[str, ...]]:
    """The flags that make a trunk hold forwards in each of its ways."""
    # The adapter and a few boundaries fit, a graph does not.
    small = ("--session-held-bytes", str(64 * MIB))
    found = {"retained": (), "recomputed": small}
    if "offload_dir" in TrunkSettings.model_fields:
        disk = ("--offload-dir", str(scratch), "--offload-bytes", str(4 * KIB * MIB))
        found["offloaded"] = (*small, *disk)
    return found


def held(model: str, flags: tuple[str, ...], counts: tuple[int, int]) -> dict[str, float]:
    """Bytes a token of forwards that wait for their backward, and what stays afterwards.

    Args:
        model: Folder.
        flags: Of the trunk.
        counts: Few and many: the bytes are those of the forwards between, so that what a process
            takes once, however many it holds, is not divided among them.
    """
    with daemon(model, *flags) as trunk, TrainingClient(trunk.address, lora()) as client:
        trainee = Trainee(client)
        for _ in range(2):
            trainee.step()
        before = trunk.rss()
        resident, accounted, outputs = [], [], []
        for number in range(1, counts[-1] + 1):
            outputs.append(hold(client))
            if number in counts:
                resident.append(trunk.rss())
                accounted.append(trunk.accounted())
        outputs.clear()
        left = [_left(trunk, trainee) - before]
        for _ in range(1, ROUNDS):
            outputs = [hold(client) for _ in range(counts[1])]
            outputs.clear()
            left.append(_left(trunk, trainee) - before)
    tokens = (counts[1] - counts[0]) * BATCH * TOKENS
    return {
        "resident": (resident[1] - resident[0]) / tokens,
        "accounted": (accounted[1] - accounted[0]) / tokens,
        "left MiB": max(left) / MIB,
        "grown MiB": (left[-1] - left[0]) / MIB,
    }


def hold(client: TrainingClient) -> torch.Tensor:
    """A forward [B, T, D] whose graph the trunk holds for as long as the result is there."""
    passage = client.model.passage
    passage.remember(None)
    output: torch.Tensor = passage.through(
        torch.randn(BATCH, TOKENS, WIDTH, requires_grad=True), None, None, True
    )
    return output


def _left(trunk: Daemon, trainee: Trainee) -> int:
    """Resident bytes after two steps, the first of which tells the trunk what was dropped."""
    for _ in range(2):  # a backward's memory goes back as well
        trainee.step()
    return trunk.rss()


def step_seconds(model: str, kinds: dict[str, tuple[str, ...]], pairs: int) -> dict[str, float]:
    """Median seconds of a step in each mode, the modes in turn."""
    taken: dict[str, list[float]] = {name: [] for name in kinds}
    with ExitStack() as stack:
        trainees: dict[str, Trainee] = {}
        for name, flags in kinds.items():
            trunk = stack.enter_context(daemon(model, *flags))
            client = stack.enter_context(TrainingClient(trunk.address, lora()))
            trainees[name] = Trainee(client)
            trainees[name].step()
        for _ in range(pairs):
            for name, trainee in trainees.items():
                taken[name].append(trainee.step())
    return {name: median(seconds) for name, seconds in taken.items()}


def held_state(model: str, scratch: Path, pairs: int) -> Section:
    """What each way of holding a forward takes, and what it costs."""
    section = Section("memory_held", "Memory of a forward that waits for its backward")
    kinds = modes(scratch)
    seconds = step_seconds(model, kinds, pairs)
    for name, flags in kinds.items():
        found = held(model, flags, HELD.get(name, MANY_HELD))
        row: Row = {"mode": name}
        row["resident KiB a token"] = found["resident"] / KIB
        row["accounted KiB a token"] = found["accounted"] / KIB
        row["KiB a token and block"] = found["resident"] / KIB / LAYERS_ON_TRUNK
        row["left afterwards MiB"] = found["left MiB"]
        row["step s"] = seconds[name]
        row["of retained"] = seconds[name] / seconds["retained"]
        section.rows.append(row)
        for what, key in (("left afterwards", "left MiB"), ("grown over the rounds", "grown MiB")):
            section.claims.append(Claim(f"{name}: {what}, MiB", found[key], LEFT_MIB))
    retained, recomputed = section.rows[:2]
    per_block, whole = retained["KiB a token and block"], recomputed["resident KiB a token"]
    section.claims += [
        Claim("retained: KiB a token and block", per_block, 90.0),
        Claim("recomputed: KiB a token", whole, 4.0),
    ]
    section.notes = [
        f"Forwards of {BATCH}x{TOKENS} tokens held at once: what those from the 1st to the 4th add "
        "where they are retained, from the 4th to the 16th elsewhere. A step is one of them with "
        f"its backward and the optimizer, on the trunk alone, medians of {pairs} in turn.",
        "Left afterwards: over the same trunk before, idle, after as many are held, released and "
        f"followed by two steps; the most of {ROUNDS} rounds. Grown: from the first round to the "
        "last. An idle process goes up and down by 10 MiB; a round uses up to 1.4 GiB.",
    ]
    return section


def measure(quick: bool = False) -> list[Section]:
    """Of tenants and of held state."""
    counts, pairs = ((1, 4), 2) if quick else (TENANTS, STEP_PAIRS)
    with tempfile.TemporaryDirectory() as scratch:
        model, spill = str(gpt2_small(Path(scratch) / "model")), Path(scratch) / "spill"
        spill.mkdir()
        return [tenants(model, counts), held_state(model, spill, pairs)]


if __name__ == "__main__":
    run_alone(measure, __doc__)
