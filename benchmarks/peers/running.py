"""The harness's side: starts systems, lets one of them step at a time, ends all they started."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.processes import cpu_seconds

ROOT = Path(__file__).parents[2]
START_TIMEOUT_S = 240.0
STEP_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 20.0


class SystemFailedError(RuntimeError):
    """A system could not be installed, started or stepped; says why."""


@dataclass(frozen=True)
class System:
    """How to start a system."""

    module: str
    options: Sequence[str] = ()
    python: Path | None = None
    """Of another environment than this one."""
    environment: Mapping[str, str] = field(default_factory=dict)
    threads: int = 2
    required: bool = False
    """Whether nothing can be said without it."""


@dataclass(frozen=True)
class Sample:
    """One step."""

    seconds: float
    cpu_s: float
    """User and system, of all the system's processes, while it stepped."""
    loss: float
    wire_bytes: int
    """What went over the loopback interface meanwhile, headers and acknowledgements included."""
    idle_cpu: float
    """CPU seconds a second since the system's step before, while others stepped."""


class Running:
    """A system's driver and everything that descends from it."""

    def __init__(self, system: System, model: Path, adapter: Path) -> None:
        self.system = system
        self._log = tempfile.TemporaryFile("w+b")  # noqa: SIM115 - closed when all has ended
        self._seen: set[psutil.Process] = set()
        self._ended = False
        self._link: socket.socket | None = None
        self._lines: Any = None
        self._idle_since: tuple[float, float] | None = None
        with socket.create_server(("127.0.0.1", 0)) as listener:
            host, port = listener.getsockname()
            arguments = ["--control", f"{host}:{port}", "--model", str(model)]
            arguments += ["--adapter", str(adapter), "--threads", str(system.threads)]
            self._process = self._spawn([*arguments, *system.options])
            try:
                self._link = self._accept(listener)
                self._lines = self._link.makefile("rw")
                self._answer(START_TIMEOUT_S)
            except BaseException:
                self._end()
                raise

    def step(self, seed: int) -> Sample:
        """Lets the system do one step.

        Raises:
            SystemFailedError: If it ends or does not answer; has what it said.
        """
        cpu, wire, began = cpu_seconds(self._process.pid), _loopback_bytes(), time.monotonic()
        idle = 0.0
        if self._idle_since is not None:
            then, cpu_then = self._idle_since
            idle = max(0.0, cpu - cpu_then) / (began - then)
        self._ask({"cmd": "step", "seed": seed})
        answer = self._answer(STEP_TIMEOUT_S)
        wire = _loopback_bytes() - wire
        cpu_now = cpu_seconds(self._process.pid)
        self._idle_since = (time.monotonic(), cpu_now)
        return Sample(answer["seconds"], cpu_now - cpu, answer["loss"], wire, idle)

    def stop(self) -> None:
        """Asks the driver to end, waits, and ends what is left of it; does nothing again."""
        if self._ended:
            return
        try:
            self._note_descendants()
            self._ask({"cmd": "stop"})
            self._link.shutdown(socket.SHUT_WR)
            self._process.wait(STOP_TIMEOUT_S)
        except (OSError, SystemFailedError, psutil.Error, subprocess.TimeoutExpired):
            pass  # it is ended below, whatever state it is in
        finally:
            self._end()

    def _spawn(self, arguments: list[str]) -> subprocess.Popen[bytes]:
        python = self.system.python or Path(sys.executable)
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "HF_HUB_OFFLINE": "1",
            # Else the waiting threads of one side take the cores of the other.
            "OMP_WAIT_POLICY": "PASSIVE",
            "OMP_NUM_THREADS": str(self.system.threads),
            **self.system.environment,
        }
        return subprocess.Popen(
            [str(python), "-m", self.system.module, *arguments],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            # An interrupt at the terminal is the harness's to handle, which then ends them all.
            start_new_session=True,
        )

    def _accept(self, listener: socket.socket) -> socket.socket:
        listener.settimeout(0.5)
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            try:
                link, _ = listener.accept()
            except TimeoutError:
                self._note_descendants()
                if self._process.poll() is not None:
                    raise SystemFailedError(self._said("ended at its start")) from None
            else:
                return link
        raise SystemFailedError(self._said(f"not ready within {START_TIMEOUT_S:.0f} s"))

    def _ask(self, order: dict[str, Any]) -> None:
        try:
            self._lines.write(json.dumps(order) + "\n")
            self._lines.flush()
        except OSError as error:
            raise SystemFailedError(self._said(f"does not listen ({error})")) from error

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        self._link.settimeout(timeout_s)
        try:
            line = self._lines.readline()
        except OSError as error:
            raise SystemFailedError(self._said(f"does not answer ({error})")) from error
        if not line:
            # What it died of is said once its own clean-up is done.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_TIMEOUT_S)
            raise SystemFailedError(self._said("ended"))
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _said(self, what: str) -> str:
        self._log.seek(0)
        lines = self._log.read().decode("utf-8", "replace").strip().splitlines()
        errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
        # What follows the first error is mostly what its clean-up ran into.
        told = errors[0] if errors else (lines or ["nothing"])[-1]
        return f"{what}; it said: {told}"

    def _note_descendants(self) -> None:
        """Remembers all descendants: one whose parent has gone cannot be found any more."""
        try:
            self._seen |= set(psutil.Process(self._process.pid).children(recursive=True))
        except psutil.NoSuchProcess:
            return

    def _end(self) -> None:
        self._ended = True
        self._note_descendants()
        left = [p for p in self._seen if p.is_running()] + _session(self._process.pid)
        if self._process.poll() is None:
            self._process.terminate()
        for process in left:
            _quietly(process.terminate)
        _, left = psutil.wait_procs(left, timeout=5)
        for process in left:
            _quietly(process.kill)
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for opened in (self._lines, self._link):
            if opened is not None:
                opened.close()
        self._log.close()


def _session(leader: int) -> list[psutil.Process]:
    """The processes of a driver's session, other than itself: also those it lost sight of."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != leader and os.getsid(process.pid) == leader:
                found.append(process)
        except (OSError, psutil.Error):
            continue
    return found


def _quietly(end: Any) -> None:
    try:
        end()
    except psutil.NoSuchProcess:
        return


def _loopback_bytes() -> int:
    return int(psutil.net_io_counters(pernic=True)["lo"].bytes_sent)
