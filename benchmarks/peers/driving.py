"""The driver's side: connects to the harness, does one training step for every line it is sent.

The harness listens on a loopback socket, because not every system leaves its processes a standard
input. A closed connection means stop, so that a driver does not outlive a harness that was killed.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpt2_small import VOCABULARY

BATCH, TOKENS = 4, 128
LEARNING_RATE = 1e-4
END_TIMEOUT_S = 30.0

Step = Callable[[torch.Tensor], float]


@dataclass(frozen=True)
class Task:
    """What the harness tells a driver."""

    model: Path
    adapter: Path
    control: tuple[str, int]
    threads: int
    options: argparse.Namespace = field(default_factory=argparse.Namespace)

    def serve(self, step: Step) -> None:
        """Steps as often as the harness asks, then returns; this process must end soon after."""
        try:
            with socket.create_connection(self.control) as link, link.makefile("rw") as lines:
                _say(lines, {"ready": True})
                for line in lines:
                    order = json.loads(line)
                    if order["cmd"] != "step":
                        return
                    _say(lines, _timed(step, batch(order["seed"])))
        finally:
            _end_within(END_TIMEOUT_S)


def task(*flags: str) -> Task:
    """Reads the command line; ``flags`` are names of whole numbers that this driver also takes."""
    logging.basicConfig(level="INFO")
    parser = argparse.ArgumentParser()
    parser.add_argument("--control", required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    for flag in flags:
        parser.add_argument(f"--{flag}", type=int)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    host, _, port = given.control.rpartition(":")
    return Task(given.model, given.adapter, (host, int(port)), given.threads, given)


def batch(seed: int) -> torch.Tensor:
    """Token ids, the same in every process for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (BATCH, TOKENS), generator=generator)


def adamw(parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of everything that is trained, on either side."""
    return torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=LEARNING_RATE)


def start_worker(module: str, *arguments: str) -> subprocess.Popen[bytes]:
    """Starts the other side of a system as a process that ends with this one."""
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE)


def leave_with_parent() -> None:
    """Ends this process when its standard input does: also after a kill of its parent."""

    def watch() -> None:
        sys.stdin.buffer.read()
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


def _end_within(seconds: float) -> None:
    """Kills this driver and all it started if it lives longer: some libraries hang in their end.

    The harness does so too, unless it was killed itself.
    """

    def end() -> None:
        if os.getpgrp() == os.getsid(0):  # as the harness starts it, not a part of somebody's shell
            os.killpg(os.getpgrp(), signal.SIGKILL)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


def _timed(step: Step, ids: torch.Tensor) -> dict[str, float]:
    started = time.perf_counter()
    loss = step(ids)
    return {"seconds": time.perf_counter() - started, "loss": loss}


def _say(lines: Any, answer: dict[str, Any]) -> None:
    lines.write(json.dumps(answer) + "\n")
    lines.flush()
