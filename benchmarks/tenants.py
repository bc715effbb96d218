"""Several tenants at once on one trunk: what they get done together, and how even their shares are.

The clients carry hidden states and step their adapters, no more: the cores are the trunk's. Each is
a session of its own, driven by a thread of this process; what this process computes, and what else
ran on the machine, is shown beside, since both come off the trunk's cores. In one more case the
clients wait as long as a model's ends would take them on a machine of their own.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from threading import Barrier, BrokenBarrierError, Thread

import psutil
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.gpt2_small import LAYERS_ON_TRUNK, SPLIT, WIDTH, gpt2_small, lora
from benchmarks.peers.driving import adamw
from benchmarks.processes import cpu_seconds, trunk_processes
from benchmarks.report import Claim, Row, Section, run_alone
from client_service.local_trunk import local_trunk
from client_service.training_client import TrainingClient

LOG = logging.getLogger("tenants")

BATCH, TOKENS = 4, 128
COUNTS, ROUNDS = (1, 2, 4, 8), 3
DEFAULT, FIXED, ADAPTIVE = "1 x 2 threads", "2 x 1 thread", "adaptive"
FLAGS: dict[str, tuple[str, ...]] = {
    DEFAULT: ("--workers", "1", "--threads", "2"),
    FIXED: ("--workers", "2", "--threads", "1"),
    ADAPTIVE: ("--adaptive", "--workers", "2", "--threads", "2"),
}
_LONGEST_WAIT_S = 300.0


@dataclass(frozen=True)
class Load:
    """What a number of tenants got done in one window."""

    rates: list[float]
    """Steps a second, by tenant."""
    trunk_cores: float
    client_cores: float
    other_cores: float
    """Seconds of compute a second: of the trunk, of the clients, and of everything else."""

    @property
    def tokens_per_s(self) -> float:
        return sum(self.rates) * BATCH * TOKENS

    @property
    def slowest_share(self) -> float:
        """Of the slowest tenant, as a part of an even share."""
        return min(self.rates) * len(self.rates) / sum(self.rates)


class _Tenant(Thread):
    """Steps until the window is over; ``rate`` is how often a second."""

    def __init__(self, address: str, seed: int, window: _Window, pause_s: float) -> None:
        super().__init__(name=f"tenant-{seed}", daemon=True)
        self._address, self._seed, self._window = address, seed, window
        self._pause_s = pause_s
        self.rate = 0.0
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            self._train()
        except BaseException as error:
            self.failure = error
            self._window.abort()

    def _train(self) -> None:
        generator = torch.Generator().manual_seed(self._seed)
        shape = BATCH, TOKENS, WIDTH
        self._hidden_BTD = torch.randn(shape, generator=generator)
        self._gradient_BTD = torch.randn(shape, generator=generator) / self._hidden_BTD.numel()
        with TrainingClient(self._address, lora(), seed=self._seed) as client:
            self._optimizer = adamw(client.parameters())
            self._step(client)
            ends_at = self._window.begin()
            started, steps = time.monotonic(), 0
            # A step that began in the window is counted whole, with its time.
            while time.monotonic() < ends_at:
                self._step(client)
                steps += 1
            self.rate = steps / (time.monotonic() - started)
            self._window.end()

    def _step(self, client: TrainingClient) -> None:
        client.forward(self._hidden_BTD)
        time.sleep(self._pause_s)
        client.backward(self._gradient_BTD)
        self._optimizer.step()
        self._optimizer.zero_grad()


class _Window:
    """The time that all tenants step in."""

    def __init__(self, tenants: int, seconds: float) -> None:
        self._seconds = seconds
        self._begun, self._ended = Barrier(tenants + 1), Barrier(tenants + 1)

    def begin(self) -> float:
        self._begun.wait(_LONGEST_WAIT_S)
        return time.monotonic() + self._seconds

    def end(self) -> None:
        self._ended.wait(_LONGEST_WAIT_S)

    def abort(self) -> None:
        self._begun.abort()
        self._ended.abort()


def load(address: str, tenants: int, seconds: float, pause_s: float = 0.0) -> Load:
    """Lets tenants step for a while, each waiting ``pause_s`` between forward and backward.

    Raises:
        RuntimeError: If one failed.
    """
    trunk = trunk_processes()[0].pid
    window = _Window(tenants, seconds)
    threads = [_Tenant(address, seed, window, pause_s) for seed in range(tenants)]
    for thread in threads:
        thread.start()
    try:
        window.begin()
        before = _cpu_seconds(trunk)
        window.end()
        after = _cpu_seconds(trunk)
    except BrokenBarrierError:
        failures = [thread.failure for thread in threads if thread.failure is not None]
        raise RuntimeError("a tenant failed") from failures[0] if failures else None
    finally:
        for thread in threads:
            thread.join(timeout=60)
    took, *used = (b - a for a, b in zip(before, after, strict=True))
    return Load([thread.rate for thread in threads], *(seconds / took for seconds in used))


def _cpu_seconds(trunk: int) -> tuple[float, float, float, float]:
    """The time now, and seconds of compute of the trunk, of this process, of all others."""
    host, of_trunk, own = psutil.cpu_times(), cpu_seconds(trunk), sum(os.times()[:2])
    busy = host.user + host.nice + host.system
    return time.monotonic(), of_trunk, own, busy - of_trunk - own


def ends_seconds(repeats: int = 3) -> float:
    """What a step of the model's two ends takes on two cores: its blocks, embedding and loss."""
    config = GPT2Config(n_layer=12 - LAYERS_ON_TRUNK, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).requires_grad_(False).train()
    model.transformer.wte.weight.requires_grad_(True)  # a gradient must flow through
    ids = torch.randint(0, config.vocab_size, (BATCH, TOKENS))
    took = []
    for _ in range(repeats):
        started = time.monotonic()
        embedded = model.transformer.wte(ids).detach().requires_grad_(True)
        model(inputs_embeds=embedded, labels=ids, use_cache=False).loss.backward(inputs=[embedded])
        took.append(time.monotonic() - started)
    return median(took)


def measure(quick: bool = False) -> list[Section]:
    """Tokens a second of 1 to 8 tenants under each setting of the trunk's threads."""
    counts, rounds = ((1, 4), 1) if quick else (COUNTS, ROUNDS)
    pause_s = ends_seconds()
    found: dict[str, dict[int, list[Load]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        model = str(gpt2_small(Path(scratch)))
        for name, flags in FLAGS.items():
            with local_trunk(model, SPLIT, flags=flags) as address:
                found[name] = _rounds(address, counts, rounds)
                if name == ADAPTIVE:
                    found[f"{name}, ends elsewhere"] = _rounds(address, counts, rounds, pause_s)
    return [_section(found, pause_s)]


def _rounds(
    address: str, counts: tuple[int, ...], rounds: int, pause_s: float = 0.0
) -> dict[int, list[Load]]:
    """In turn, so that what else runs on the machine falls on all counts alike."""
    found: dict[int, list[Load]] = {tenants: [] for tenants in counts}
    for _ in range(rounds):
        for tenants in counts:
            found[tenants].append(load(address, tenants, 3 + 2.5 * tenants + pause_s, pause_s))
    return found


def _section(found: dict[str, dict[int, list[Load]]], pause_s: float) -> Section:
    section = Section("tenants", "Several tenants on one trunk")
    alone = max(_tokens_per_s(loads[1]) for loads in found.values())
    waiting = f"{ADAPTIVE}, ends elsewhere"
    for name, loads in found.items():
        own = _tokens_per_s(found[waiting][1]) if name == waiting else alone
        section.rows += [_row(name, n, loads[n], own) for n in loads]
        gain = _tokens_per_s(loads[4]) / own
        if name != DEFAULT:
            section.claims.append(
                Claim(f"4 tenants of the best one alone ({name})", gain, 1.3, False)
            )
    for name, loads in found.items():
        for n in [n for n in loads if n > 1]:
            share = median(one.slowest_share for one in loads[n])
            section.claims.append(
                Claim(f"slowest of {n}, of an even share ({name})", share, 0.9, False)
            )
    section.notes = [
        f"Steps of {BATCH}x{TOKENS} tokens, LoRA r=8 on GPT-2 small's {LAYERS_ON_TRUNK} middle "
        "blocks, float32. Medians over rounds in which the counts take turns.",
        "Settings: " + "; ".join(f"{n}: `{' '.join(f)}`" for n, f in FLAGS.items()) + ".",
        f"Ends elsewhere: each client waits {pause_s:.2f} s between forward and backward, what a "
        "step of the ends takes on two cores; its ratio is to one such client.",
    ]
    return section


def _tokens_per_s(loads: list[Load]) -> float:
    return median(one.tokens_per_s for one in loads)


def _row(name: str, tenants: int, loads: list[Load], alone: float) -> Row:
    return {
        "trunk": name,
        "tenants": tenants,
        "tokens/s": _tokens_per_s(loads),
        "of one alone": _tokens_per_s(loads) / alone,
        "slowest's share": median(one.slowest_share for one in loads),
        "trunk cores": median(one.trunk_cores for one in loads),
        "client cores": median(one.client_cores for one in loads),
        "other cores": median(one.other_cores for one in loads),
    }


if __name__ == "__main__":
    run_alone(measure, __doc__)
