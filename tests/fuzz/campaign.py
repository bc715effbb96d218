"""Fuzzes a daemon for a while: plays scripts, watches, and keeps what led to a fault."""

from __future__ import annotations

import random
import re
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any

from tests.fuzz.bystander import Bystander
from tests.fuzz.hostile import hostile, outside_a_session
from tests.fuzz.mutations import mutate
from tests.fuzz.peer import Outcome, play
from tests.fuzz.script import Script, Stream, write_scripts
from tests.fuzz.valid import Sequence, sequence
from tests.fuzz.watch import Watch
from tests.patience import PATIENCE_S

_REMEMBERED = 12


def generate(seed: int, number: int) -> Script:
    """The script of a number; the same for the same seed."""
    rng = random.Random(f"{seed}/{number}")
    chance = rng.random()
    if chance < 0.45:
        script = Script("mutated", [Stream(mutate(sequence(rng), rng))])
    elif chance < 0.80:
        script = hostile(rng)
        if rng.random() < 0.15:
            script.streams[0].frames = mutate(script.streams[0].frames, rng)
    elif chance < 0.92:
        script = _resumed(rng)
    elif chance < 0.97:
        script = outside_a_session(rng)
    else:
        frames = mutate(sequence(rng), rng)
        script = Script("broken off", [Stream(frames, cancel_after=rng.randrange(1, 4))])
    return Script(f"{script.name} #{number}", script.streams)


def _resumed(rng: random.Random) -> Script:
    """A connection that breaks off, and others that go on with its session, harmed or not."""
    built = Sequence(rng)
    built.open()
    for _ in range(rng.randrange(1, 4)):
        built.anything()
    streams = [Stream(list(built.frames), cancel_after=rng.randrange(1, 4))]
    epoch = 1
    for _ in range(rng.randrange(1, 4)):
        epoch += rng.choice((1, 1, 1, 0, 2**63))
        again = Sequence(rng)
        again.resume(min(epoch, 2**64 - 1))
        # What was not answered is sent again under its old id; sometimes something else is.
        frames = again.frames + built.frames[rng.randrange(1, len(built.frames) + 1) :]
        if rng.random() < 0.6:
            frames = mutate(frames, rng)
        streams.append(Stream(frames, cancel_after=rng.choice((None, 1, 3))))
    return Script("resumed", streams)


@dataclass
class Report:
    """What was sent, how it was answered, and what must not have happened."""

    seed: int
    scripts: int = 0
    totals: Outcome = field(default_factory=Outcome)
    faults: list[dict[str, Any]] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)
    bystander_rounds: int = 0
    slowest: dict[str, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """For printing."""
        totals = self.totals
        return {
            "seed": self.seed,
            "scripts": self.scripts,
            "streams": totals.streams,
            "frames": totals.frames,
            "answers": dict(sorted(totals.codes.items())),
            "statuses": dict(sorted(totals.statuses.items())),
            "statuses_of_grpc_itself": dict(totals.grpc_own),
            "memory_mib": {name: count >> 20 for name, count in self.memory.items()},
            "bystander_rounds": self.bystander_rounds,
            "slowest_s": self.slowest,
            "faults": self.faults,
        }


class Campaign:
    """Plays scripts on several threads until that is enough or something went wrong.

    Args:
        address: The daemon.
        watch: Of its process; None for a daemon elsewhere.
        seed: Of all scripts.
        out: Folder for what led to a fault.
        keep_going: Collects faults of different kinds instead of ending with the first.
    """

    def __init__(
        self, address: str, watch: Watch | None, seed: int, out: Path, keep_going: bool = False
    ) -> None:
        self._address, self._watch, self._out = address, watch, out
        self._keep_going = keep_going
        self._bystander = Bystander(address, every_s=2.0)
        if watch is not None:
            watch.start()  # with what the first session made it load
        self._lock = threading.Lock()
        self._recent: deque[Script] = deque(maxlen=_REMEMBERED)
        self._kinds: Counter[str] = Counter()
        self._ended = threading.Event()
        self._numbers = iter(range(0))
        self.report = Report(seed)

    def run(self, seconds: float = inf, scripts: int = 2**62, threads: int = 2) -> Report:
        """Fuzzes for a time, or with so many scripts."""
        deadline, self._numbers = time.monotonic() + seconds, iter(range(scripts))
        workers = [threading.Thread(target=self._work, args=(deadline,)) for _ in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return self._finish()

    def replay(self, scripts: list[Script]) -> Report:
        """Plays given scripts one after the other."""
        for script in scripts:
            self._play(script)
        return self._finish()

    def _work(self, deadline: float) -> None:
        while time.monotonic() < deadline and not self._ended.is_set():
            with self._lock:
                number = next(self._numbers, None)
            if number is None:
                return
            self._play(generate(self.report.seed, number))

    def _play(self, script: Script) -> None:
        with self._lock:
            self._recent.append(script)
        started = time.monotonic()
        outcome = play(self._address, script)
        took = time.monotonic() - started
        with self._lock:
            self._count(script.name.rpartition(" #")[0] or script.name, outcome, took)
        # A fault that an answer shows is that script's own; one of the log or the process may be
        # any of those that were played just now.
        for fault in outcome.faults:
            self._note(fault, [script])
        for fault in self._watched():
            self._note(fault, list(self._recent))

    def _watched(self) -> list[str]:
        found = self._watch.faults() if self._watch is not None else []
        if self._bystander.fault is not None:
            found.append(self._bystander.fault)
        return found

    def _count(self, name: str, outcome: Outcome, took: float) -> None:
        report, totals = self.report, self.report.totals
        report.scripts += 1
        totals.streams += outcome.streams
        totals.frames += outcome.frames
        totals.codes += outcome.codes
        totals.statuses += outcome.statuses
        totals.grpc_own += outcome.grpc_own
        report.slowest[name] = round(max(report.slowest.get(name, 0.0), took), 2)

    def _note(self, fault: str, scripts: list[Script]) -> None:
        kind = re.sub(r"#?\d+", "#", f"{fault[:80]} {fault[-160:]}")
        with self._lock:
            self._kinds[kind] += 1
            if self._kinds[kind] > 1:
                return
            path = self._out / f"fault-{self.report.seed}-{len(self.report.faults)}.json"
            self.report.faults.append({"fault": fault, "replay": str(path)})
            write_scripts(path, {"seed": self.report.seed, "fault": fault}, scripts)
        if not self._keep_going:
            self._ended.set()

    def _finish(self) -> Report:
        self._bystander.close()
        for fault in self._watched():
            self._note(fault, list(self._recent))
        self.report.bystander_rounds = self._bystander.rounds
        if self._watch is not None and not self._watch.gone:
            rss, fault = self._watch.settle(PATIENCE_S)
            if fault is not None:
                self._note(fault, list(self._recent))
            watch = self._watch
            self.report.memory = {"start": watch.start_rss, "most": watch.max_rss, "end": rss}
        return self.report
