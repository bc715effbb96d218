"""Watches the daemon while it is fuzzed: whether it lives, what it logs, how much it holds."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import psutil

from tests.conftest import Daemon, start_daemon
from tests.models import save_tiny_model

HELD_BYTES = 200_000_000
SESSION_HELD_BYTES = 50_000_000
SLACK_BYTES = 400_000_000
"""What the process may use beside what it accounts for: gRPC's buffers, messages under way,
modules of sessions, and what the allocator does not give back."""
NEAR_START_BYTES = 250_000_000
"""How much more than at the start may be in use once all streams have ended."""


def start_trunk(folder: Path) -> Daemon:
    """Starts a trunk with a tiny model and small budgets."""
    model = save_tiny_model("gpt2", folder / "model")
    return start_daemon(
        folder,
        *("--model", str(model), "--threads", "1", "--max-tokens-per-request", "512"),
        *("--max-adapter-parameters", "300000"),
        *("--return-memory-after-s", "1"),
        *("--held-bytes", str(HELD_BYTES), "--session-held-bytes", str(SESSION_HELD_BYTES)),
        forked=False,  # its memory is its own
    )


class Watch:
    """Looks at a daemon each second, and at its log whenever asked.

    Args:
        daemon: Whose process and log.
    """

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._process = psutil.Process(daemon.process.pid)
        self._log = daemon.log_path.open(encoding="utf-8", errors="replace")
        self._lock = threading.Lock()
        self._partial = ""
        self._stop = threading.Event()
        self.most_descriptors = 0
        self.limit = 0
        self.start()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._sampler.start()

    def start(self) -> None:
        """Takes what the daemon holds now for its start."""
        self.start_rss = self.max_rss = self._process.memory_info().rss
        self.limit = self.start_rss + HELD_BYTES + SLACK_BYTES

    def faults(self) -> list[str]:
        """What went wrong since the last call."""
        found = self._new_log_faults()
        if (status := self._daemon.process.poll()) is not None:
            found.append(f"the daemon ended with {status}")
        if self.max_rss > self.limit:
            found.append(f"RSS {self.max_rss >> 20} MiB is above {self.limit >> 20} MiB")
            self.limit = self.max_rss + HELD_BYTES  # told once, and again if it goes on growing
        return found

    @property
    def gone(self) -> bool:
        """Whether the process has ended."""
        return self._daemon.process.poll() is not None

    def settle(self, timeout_s: float) -> tuple[int, str | None]:
        """Waits until the memory is back near the start; returns it, and the fault if it is not."""
        pause = threading.Event()
        rss = self._process.memory_info().rss
        for _ in range(int(timeout_s)):
            if rss <= self.start_rss + NEAR_START_BYTES:
                return rss, None
            pause.wait(1.0)
            rss = self._process.memory_info().rss
        return rss, f"RSS stays at {rss >> 20} MiB; it began at {self.start_rss >> 20} MiB"

    def close(self) -> None:
        """Stops looking."""
        self._stop.set()
        self._sampler.join()
        self._log.close()

    def _sample(self) -> None:
        while not self._stop.wait(1.0):
            try:
                self.max_rss = max(self.max_rss, self._process.memory_info().rss)
                self.most_descriptors = max(self.most_descriptors, self._process.num_fds())
            except psutil.Error:
                return  # it is gone, which `faults` tells

    def _new_log_faults(self) -> list[str]:
        with self._lock:
            text = self._partial + self._log.read()
            lines = text.split("\n")
            self._partial = lines.pop()
            return [fault for line in lines if (fault := _fault_in(line))]


def _fault_in(line: str) -> str:
    if "SendStatusFromServerOperation" in line and "ExecuteBatchError" in line:
        # gRPC for Python, after gRPC's core has ended a stream itself (a frame above the cap).
        return ""
    try:
        entry = json.loads(line)
    except ValueError:
        return f"log: {line[:500]}" if "Traceback" in line or "Error" in line else ""
    if "traceback" not in entry and entry.get("level") not in ("ERROR", "CRITICAL"):
        return ""
    return f"log: {entry.get('message')} {str(entry.get('traceback', ''))[-1500:]}"
