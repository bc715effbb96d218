"""The real processes of an experiment: trunk daemons and training clients that can be restarted."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from shared.failpoints import VARIABLE
from tests.chaos.gate import VARIABLE as GATE
from tests.chaos.gate import Gate
from tests.chaos.metrics import MetricsTail
from tests.chaos.report import BrokenError
from tests.chaos.stage import BATCH, SPLIT, TOKENS, Stage
from tests.patience import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]

# Files are looked at this often; the end of a process is noticed at once.
_LOOK_S = 0.02
_SAID_CHARACTERS = 4000


class Child:
    """A process, ended with its stage.

    Args:
        stage: Whose process it is.
        command: Arguments of the Python interpreter.
        log: Receives both its outputs, after what is there.
        failpoints: ``TRUNKLINE_FAILPOINTS`` of the process.
        environment: What it has besides ours.
    """

    def __init__(
        self,
        stage: Stage,
        command: Sequence[str],
        log: Path,
        failpoints: str = "",
        environment: dict[str, str] | None = None,
    ) -> None:
        inherited = {k: v for k, v in os.environ.items() if k != VARIABLE}
        own = {
            "OMP_WAIT_POLICY": "PASSIVE",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(ROOT),
            **({VARIABLE: failpoints} if failpoints else {}),
            **(environment or {}),
        }
        self.log = log
        # With faulthandler, SIGABRT writes where every thread stands.
        arguments = [sys.executable, "-X", "faulthandler", *command]
        self._said_before = log.stat().st_size if log.exists() else 0
        with log.open("ab") as sink:
            self.popen = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                cwd=stage.folder,
                env=inherited | own,
            )
        self.pid = self.popen.pid
        self.fd = os.pidfd_open(self.pid)
        stage.exits.callback(self._end)

    @property
    def alive(self) -> bool:
        return self.popen.poll() is None

    def send(self, number: signal.Signals) -> None:
        self.popen.send_signal(number)

    def wait(self, timeout_s: float, what: str) -> int:
        """Waits for its end; returns the exit status.

        Raises:
            BrokenError: If it does not end in time.
        """
        try:
            return self.popen.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            raise BrokenError(f"{what} did not end in {timeout_s:g} s: {self.stacks()}") from error

    def stacks(self) -> str:
        """Ends it so that it says where its threads stand; returns the last it wrote."""
        if self.alive:
            self.send(signal.SIGCONT)
            self.send(signal.SIGABRT)
            self.popen.wait()
        return self.said()

    def said(self) -> str:
        """The last it wrote."""
        written = self.log.read_bytes()[self._said_before :]
        return written.decode("utf-8", "replace")[-_SAID_CHARACTERS:]

    def _end(self) -> None:
        if self.alive:
            self.popen.kill()
            self.popen.wait()
        os.close(self.fd)


class Trunk:
    """A trunk daemon, by name, on one port for all its lives.

    Args:
        stage: Where it runs.
        name: Of its files.
        flags: More flags of the daemon.
        module: What is run as the daemon, if not the daemon itself.
        environment: What it has besides ours.
    """

    def __init__(
        self,
        stage: Stage,
        name: str,
        *flags: str,
        module: str = "trunk_service",
        environment: dict[str, str] | None = None,
    ) -> None:
        self._stage, self._flags, self._module = stage, flags, module
        self._environment = environment
        self._ready = stage.folder / f"{name}.ready.json"
        self.log = stage.folder / f"{name}.log"
        self.address = f"127.0.0.1:{reserved_port(stage)}"
        self.child: Child | None = None

    def start(self, failpoints: str = "") -> Child:
        self._ready.unlink(missing_ok=True)
        command = ["-m", self._module, "--model", str(self._stage.model), "--split", SPLIT]
        command += ["--listen", self.address, "--threads", "1", "--ready-file", str(self._ready)]
        self.child = Child(
            self._stage, [*command, *self._flags], self.log, failpoints, self._environment
        )
        return self.child

    @property
    def serves(self) -> bool:
        """Whether this life has written its ready file."""
        return self._ready.exists()

    @property
    def metrics_address(self) -> str:
        """Where this daemon, once it serves, serves its metrics; given ``--metrics HOST:0``."""
        return str(self.logged("metrics")[-1]["address"])

    def logged(self, message: str) -> list[dict[str, Any]]:
        """What its log says under one message, in all of its lives."""
        lines = self.log.read_text(encoding="utf-8").splitlines()
        entries = [json.loads(line) for line in lines if line[:1] == "{"]
        return [entry for entry in entries if entry["message"] == message]

    def running(self) -> Child:
        """Starts it if need be and waits until it serves."""
        child = self.child if self.child and self.child.alive else self.start()
        wait_until(lambda: self.serves, [child], PATIENCE_S, "the trunk's start")
        return child


class Training:
    """A ``trunkline train`` run, by name, that goes on where it stopped when started again.

    Args:
        stage: Where it runs.
        name: Of its files.
        trunk: Address or addresses.
        steps: Optimizer steps.
        seed: Of adapter, data order and dropout.
        checkpoint_every: Steps between checkpoints; 0 writes none.
        flags: More flags of the command.
        text: What it trains on, if not the stage's.
        environment: What its processes have besides ours.
    """

    def __init__(
        self,
        stage: Stage,
        name: str,
        trunk: str,
        steps: int,
        seed: int = 0,
        checkpoint_every: int = 0,
        flags: Sequence[str] = (),
        text: Path | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        self._stage = stage
        self.out = stage.folder / name
        self.log = stage.folder / f"{name}.log"
        self.metrics = MetricsTail(self.out / "metrics.jsonl")
        self.steps = steps
        self._mark = stage.folder / f"{name}.imported"
        gate = stage.folder / f"{name}.gate"
        self.gate = Gate(gate)
        """Holds it between two steps."""
        self._environment = {GATE: str(gate), **(environment or {})}
        self._first = ["--model", str(stage.model), "--data", str(text or stage.text)]
        self._first += ["--trunk", trunk, "--steps", str(steps), "--batch-size", str(BATCH)]
        self._first += ["--seq-len", str(TOKENS), "--seed", str(seed), "--threads", "1"]
        self._first += ["--peft-config", str(stage.peft_config), "--dropout", "0.1"]
        self._first += ["--lr", "1e-2", "--lr-schedule", "cosine", "--warmup-steps", "5"]
        # Clips every step: the norm is of all parts together.
        self._first += ["--grad-clip", "0.1", *flags]
        if checkpoint_every:
            self._first += ["--checkpoint-every", str(checkpoint_every), "--keep-last", "2"]
        self.child: Child | None = None

    def start(self, resume: bool = False, failpoints: str = "") -> Child:
        self._mark.unlink(missing_ok=True)
        arguments = ["--resume"] if resume else self._first
        command = ["-m", "tests.chaos.launch", str(self._mark), "train", "--out", str(self.out)]
        self.child = Child(
            self._stage, [*command, *arguments], self.log, failpoints, self._environment
        )
        return self.child

    @property
    def imported(self) -> bool:
        """Whether this life has loaded its libraries and begins its work."""
        return self._mark.exists()

    @property
    def began(self) -> bool:
        """Whether there is a run to resume."""
        return (self.out / "run.json").exists()

    def past(self, step: int) -> Callable[[], bool]:
        """Whether a step of this number or later was written, for :func:`wait_until`."""

        def written() -> bool:
            self.metrics.look()
            return self.metrics.last_step >= step

        return written

    def finish(self, timeout_s: float) -> None:
        """Waits for the end of the run.

        Raises:
            BrokenError: If it fails or takes too long.
        """
        assert self.child is not None
        status = self.child.wait(timeout_s, self.out.name)
        if status != 0:
            raise BrokenError(f"{self.out.name} ended with {status}: {self.child.said()}")
        self.metrics.look()


def wait_until(
    holds: Callable[[], bool],
    children: Sequence[Child],
    timeout_s: float,
    what: str,
    dump: bool = True,
) -> float:
    """Waits until something holds; returns the seconds it took.

    Args:
        holds: What to wait for.
        children: Who must live meanwhile.
        timeout_s: How long to wait.
        what: For the message.
        dump: End the children if it takes too long, so that they say where they stand.

    Raises:
        BrokenError: If a child ends before, or it takes too long.
    """
    started = time.monotonic()
    ended = select.poll()
    for child in children:
        ended.register(child.fd, select.POLLIN)
    while not holds():
        dead = ended.poll(_LOOK_S * 1000)
        if dead and not holds():
            child = next(c for c in children if c.fd == dead[0][0])
            raise BrokenError(f"{what}: a process ended with {child.popen.wait()}: {child.said()}")
        if time.monotonic() - started > timeout_s:
            stacks = "\n".join(child.stacks() for child in children) if dump else ""
            raise BrokenError(f"{what} took more than {timeout_s:g} s {stacks}")
    return time.monotonic() - started


def reserved_port(stage: Stage) -> int:
    """A port that a daemon can listen on, life after life, and nobody else is given meanwhile."""
    # Bound and not listening: who sets SO_REUSEADDR too, as gRPC does, may listen on it.
    holder = stage.exits.enter_context(socket.socket())
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    port: int = holder.getsockname()[1]
    return port
