"""Clients that open a session, send a forward and die; the trunk ends up as it was.

The trunk is looked at when it is quiet: all sessions freed, memory given back since anything was
computed, and the same for some seconds. It was warmed by as many dying clients as the first look
says; the last look is compared with that one, since an allocator and gRPC's own pools need some
load to reach their working size.
"""

from __future__ import annotations

import json
import re
import signal
import time
import urllib.request
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import psutil

from shared.pb.trunkline.v1 import trunk_pb2 as pb
from tests.chaos.options import Options
from tests.chaos.processes import Child, Trunk, wait_until
from tests.chaos.raw import RawSession
from tests.chaos.relay import Relay
from tests.chaos.report import BrokenError, Report
from tests.chaos.stage import Stage
from tests.patience import PATIENCE_S

RESUME_WINDOW_S = 1
MEMORY_BOUND = 0.02
# The last session's object, with its last answer, hangs on what is only replaced by the next: the
# compute thread's last task and the list of sessions being opened.
_LAST_SESSIONS = 2
# Of each: its last answer, and the parameters of its tree without adapters, on the shared memory.
_ITS_TENSORS = 1 + 2 * 12
_RETURN_AFTER_S, _UNCHANGED_S = "1", 4.0


@dataclass(frozen=True)
class Look:
    """What a quiet trunk has."""

    sessions: int
    """As the trunk's metrics say."""
    held_bytes: int
    session_objects: int
    """That can be reached in its heap."""
    tensors: int
    descriptors: int
    resident_bytes: int


def run(stage: Stage, options: Options, report: Report) -> None:
    cycles = options.cycles or (300 if options.short else 2000)
    warming = max(100, cycles // 10)
    killed = 2 if options.short else 20
    counts = stage.folder / "counts.json"
    trunk = Trunk(
        stage,
        "trunk",
        "--resume-window-s",
        str(RESUME_WINDOW_S),
        "--return-memory-after-s",
        _RETURN_AFTER_S,
        "--metrics",
        "127.0.0.1:0",
        module="tests.chaos.counted_trunk",
        environment={"CHAOS_COUNTS": str(counts)},
    )
    child = trunk.running()
    relay = Relay(trunk.address)
    stage.exits.callback(relay.close)
    watch = Watch(child, counts, f"http://{trunk.metrics_address}/metrics")
    first = watch.look()
    _die(relay, warming)
    warm = watch.look()
    started = time.monotonic()
    _die(relay, cycles - warming)
    per_second = (cycles - warming) / (time.monotonic() - started)
    _kill_processes(stage, trunk, killed)
    last = watch.look()
    growth = last.resident_bytes / warm.resident_bytes - 1
    report.note(
        cycles=cycles,
        cycles_per_s=round(per_second, 1),
        killed_processes=killed,
        at_start=asdict(first),
        warm_after=warming,
        warm=asdict(warm),
        last=asdict(last),
        memory_growth=round(growth, 4),
    )
    report.require(last.sessions == 0, f"{last.sessions} sessions are left")
    report.require(last.held_bytes == 0, f"{last.held_bytes} bytes are held for nobody")
    report.require(
        last.session_objects <= _LAST_SESSIONS,
        f"{last.session_objects} session objects are alive",
    )
    report.require(
        last.tensors <= first.tensors + _ITS_TENSORS * last.session_objects,
        f"{last.tensors} tensors are alive, {first.tensors} were at the start",
    )
    report.require(
        last.descriptors <= warm.descriptors,
        f"{last.descriptors} file descriptors are open, {warm.descriptors} were",
    )
    report.require(
        growth <= MEMORY_BOUND, f"resident memory grew by {growth:.1%}, bound {MEMORY_BOUND:.0%}"
    )


class Watch:
    """Looks at a trunk once it is quiet.

    Args:
        child: A process of ``tests.chaos.counted_trunk``.
        counts: The file it counts into.
        metrics: Where it serves them.
    """

    def __init__(self, child: Child, counts: Path, metrics: str) -> None:
        self._child, self._counts, self._metrics = child, counts, metrics
        self._process = psutil.Process(child.pid)

    def look(self) -> Look:
        """Waits until nothing is left of any client and memory is settled.

        Raises:
            BrokenError: If that does not come.
        """
        sessions = partial(self._gauge, "trunkline_sessions")
        try:
            wait_until(lambda: not sessions(), [self._child], PATIENCE_S, "freeing", False)
        except BrokenError as error:
            raise BrokenError(f"{sessions()} sessions of dead clients are left: {error}") from error
        wait_until(lambda: bool(self._count()["at_rest"]), [self._child], PATIENCE_S, "rest")
        last, since = self._resources, time.monotonic()

        def settled() -> bool:
            nonlocal last, since
            now = self._resources
            if now != last:
                last, since = now, time.monotonic()
            return time.monotonic() - since > _UNCHANGED_S

        wait_until(settled, [self._child], PATIENCE_S, "memory that settles")
        resident, descriptors = last  # before what follows opens a connection and a file
        counted = self._count()
        return Look(
            sessions=self._gauge("trunkline_sessions"),
            held_bytes=self._gauge("trunkline_held_bytes"),
            session_objects=counted["sessions"],
            tensors=counted["tensors"],
            descriptors=descriptors,
            resident_bytes=resident,
        )

    @property
    def _resources(self) -> tuple[int, int]:
        return int(self._process.memory_info().rss), self._process.num_fds()

    def _gauge(self, name: str) -> int:
        """The sum of a gauge over its labels."""
        with urllib.request.urlopen(self._metrics, timeout=PATIENCE_S) as answer:
            shown = answer.read().decode()
        lines = (line for line in shown.splitlines() if re.match(rf"{name}[ {{]", line))
        return round(sum(float(line.rpartition(" ")[2]) for line in lines))

    def _count(self) -> dict[str, int]:
        self._counts.unlink(missing_ok=True)
        self._child.send(signal.SIGUSR1)
        wait_until(self._counts.exists, [self._child], PATIENCE_S, "the trunk's count")
        counted: dict[str, int] = json.loads(self._counts.read_text(encoding="utf-8"))
        return counted


def _die(relay: Relay, cycles: int) -> None:
    """Opens, forwards and dies; every other time the connection is reset under the client."""
    for number in range(cycles):
        session = RawSession(relay.address)
        opened = session.open()
        while opened.error.code == pb.ERROR_CODE_RESOURCE_EXHAUSTED:
            time.sleep(opened.error.retry_after_s)  # as it is told to
            opened = session.open()
        if opened.WhichOneof("body") != "open":
            raise BrokenError(f"no session was opened in cycle {number}: {opened.error.message}")
        session.send_held_forward("never asked for again")
        answer = session.receive()
        if answer.WhichOneof("body") != "forward":
            raise BrokenError(f"no forward in cycle {number}: {answer.error.message}")
        if number % 2:
            relay.cut()
        session.abandon()


def _kill_processes(stage: Stage, trunk: Trunk, count: int) -> None:
    """Two at a time: a start is mostly imports, and there are two cores."""
    log = stage.folder / "dying.log"
    left = count
    while left > 0:
        pair = [
            Child(stage, ["-m", "tests.chaos.dying_client", trunk.address], log)
            for _ in range(min(2, left))
        ]
        for child in pair:
            status = child.wait(PATIENCE_S, "a dying client")
            if status != -signal.SIGKILL:
                raise BrokenError(f"a dying client ended with {status}: {child.said()}")
        left -= len(pair)
