"""The trunk's memory: of one more tenant, of a forward that waits for its backward, and later.

Resident memory of the daemon's process is what is measured, once it was idle for long enough to
give freed memory back; what the trunk itself accounts for stands beside it.
"""

from __future__ import annotations

import logging
import re
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
from benchmarks.processes import MIB, trunk_processes
from benchmarks.report import Claim, Row, Section, run_alone
from client_service.local_trunk import local_trunk
from client_service.optimizer_spec import OptimizerSettings
from client_service.training_client import TrainingClient
from trunk_service.settings import TrunkSettings

LOG = logging.getLogger("memory")

BATCH, TOKENS = 4, 128
TENANTS = (1, 2, 4, 8, 16, 32)
STEPS_EACH, STEP_PAIRS, ROUNDS = 2, 7, 5
HELD = {"retained": (1, 4)}
MANY_HELD = (4, 16)
ADAMW = OptimizerSettings("adamw", {"lr": 1e-4})
LEFT_MIB = 20.0
RETURN_AFTER_S = "1"  # 30 by default; what goes back is the same
IDLE_S = 3.5
KIB = 1024


@dataclass(frozen=True)
class Daemon:
    """A trunk's process."""

    address: str
    process: psutil.Process
    metrics: str

    def rss(self) -> int:
        """Resident bytes once it was idle for long enough to give freed memory back."""
        time.sleep(IDLE_S)
        return int(self.process.memory_info().rss)

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
    with local_trunk(model, SPLIT, flags=flags) as address:
        process = next(p for p in trunk_processes() if p.pid not in before)
        yield Daemon(address, process, metrics)


def step(client: TrainingClient, batch: int = BATCH) -> float:
    """One step on random hidden states; returns its seconds."""
    hidden_BTD = torch.randn(batch, TOKENS, WIDTH)
    started = time.perf_counter()
    client.forward(hidden_BTD)
    client.backward(torch.randn_like(hidden_BTD) / hidden_BTD.numel())
    client.step(ADAMW)
    return time.perf_counter() - started


def tenants(model: str, counts: tuple[int, ...]) -> Section:
    """Resident memory with more and more tenants that have trained and are idle."""
    section = Section("memory_tenants", "Memory of one more tenant")
    rss: dict[int, int] = {}
    with daemon(model) as trunk, ExitStack() as clients:
        alone = trunk.rss()
        for number in range(1, counts[-1] + 1):
            client = TrainingClient(trunk.address, lora(), seed=number)
            clients.enter_context(client)
            for _ in range(STEPS_EACH):
                step(client, batch=1)
            if number in counts:
                rss[number] = trunk.rss()
        needed = _adapter_bytes(client) + _optimizer_bytes(client)
    for number, found in rss.items():
        section.rows.append(
            {
                "tenants": number,
                "resident MiB": found / MIB,
                "beyond none, MiB": (found - alone) / MIB,
                "adapters and optimizers, MiB": number * needed / MIB,
            }
        )
    first, last = counts[0], counts[-1]
    added = (rss[last] - rss[first]) / (last - first)
    text = f"one more tenant ({added / MIB:.2f} MiB), of its adapter and optimizer"
    weights = LAYERS_ON_TRUNK * 12 * WIDTH**2 * 4
    section.claims = [
        Claim(f"{text} ({needed / MIB:.2f} MiB)", added / needed, 1.3),
        Claim(f"{last} tenants, of as many copies of the weights", added / (weights + needed), 0.1),
    ]
    section.notes = [f"LoRA r=8, AdamW, {STEPS_EACH} steps of 1x{TOKENS} tokens each, then idle."]
    return section


def _adapter_bytes(client: TrainingClient) -> int:
    return sum(t.nbytes for t in client.session.adapter().values())


def _optimizer_bytes(client: TrainingClient) -> int:
    return sum(t.nbytes for t in client.session.optimizer_state().values())


def modes(scratch: Path) -> dict[str, tuple[str, ...]]:
    """The flags that make a trunk hold forwards in each of its ways."""
    # The gradients of a few micro-batches and their boundaries fit, a graph does not.
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
        for _ in range(2):
            step(client)
        before = trunk.rss()
        hidden_BTD = torch.randn(BATCH, TOKENS, WIDTH)
        resident, accounted = [], []
        for number in range(1, counts[-1] + 1):
            client.forward(hidden_BTD, request_id=f"held-{number}")
            if number in counts:
                resident.append(trunk.rss())
                accounted.append(trunk.accounted())
        names = [f"held-{n}" for n in range(1, counts[1] + 1)]
        left = [_left(trunk, client, names) - before]
        for number in range(1, ROUNDS):
            names = [f"round-{number}-{n}" for n in range(1, counts[1] + 1)]
            for name in names:
                client.forward(hidden_BTD, request_id=name)
            left.append(_left(trunk, client, names) - before)
    tokens = (counts[1] - counts[0]) * BATCH * TOKENS
    return {
        "resident": (resident[1] - resident[0]) / tokens,
        "accounted": (accounted[1] - accounted[0]) / tokens,
        "left MiB": max(left) / MIB,
        "grown MiB": (left[-1] - left[0]) / MIB,
    }


def _left(trunk: Daemon, client: TrainingClient, names: list[str]) -> int:
    """Resident bytes after releasing forwards and two steps."""
    client.session.release(names, [])
    client.compute(torch.zeros(BATCH, 1, WIDTH))  # answered after the release
    for _ in range(2):  # a backward's memory goes back as well
        step(client)
    return trunk.rss()


def step_seconds(model: str, kinds: dict[str, tuple[str, ...]], pairs: int) -> dict[str, float]:
    """Median seconds of a step in each mode, the modes in turn."""
    taken: dict[str, list[float]] = {name: [] for name in kinds}
    with ExitStack() as stack:
        clients = {}
        for name, flags in kinds.items():
            trunk = stack.enter_context(daemon(model, *flags))
            clients[name] = stack.enter_context(TrainingClient(trunk.address, lora()))
            step(clients[name])
        for _ in range(pairs):
            for name, client in clients.items():
                taken[name].append(step(client))
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
