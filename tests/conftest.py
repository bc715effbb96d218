"""Real daemons, real checkpoints, one process a daemon."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import pytest
import torch

import client_service.link
from client_service.dropout_key import SECRET_VARIABLE
from tests.forked import ForkedDaemon
from tests.models import save_tiny_model
from tests.patience import PATIENCE_S

torch.set_num_threads(2)

MAX_ALIVE = 5

# A machine that is busy for a moment is no failure.
hypothesis.settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any machine")


def pytest_configure(config: pytest.Config) -> None:
    # PEFT asks transformers by an old name; theirs to mend.
    config.addinivalue_line("filterwarnings", "ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture(scope="session", autouse=True)
def secret_of_dropout(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test makes, or reads, that of whoever runs it; of daemons and commands neither."""
    os.environ[SECRET_VARIABLE] = str(tmp_path_factory.mktemp("secret") / "dropout_secret")


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A daemon of ours that lives answers: clients of this process wait however long it takes."""
    monkeypatch.setattr(client_service.link, "CONNECT_TIMEOUT_S", PATIENCE_S)


@pytest.fixture(autouse=True)
def same_threads() -> None:
    """A scheduler in this process sets what later threads compute with, and so the last bits."""
    torch.set_num_threads(2)


@dataclass
class Daemon:
    """A running ``trunkd``."""

    process: ForkedDaemon | subprocess.Popen[bytes]
    ready: dict[str, str]
    log_path: Path

    @property
    def address(self) -> str:
        return self.ready["address"]

    def log(self) -> str:
        return self.log_path.read_text(encoding="utf-8")


def start_daemon(folder: Path, *flags: str, forked: bool = True) -> Daemon:
    """Starts a daemon on a free port and waits until it serves.

    Args:
        folder: For its log and its ready file.
        flags: More of its command line.
        forked: From a process that has loaded its modules; without, what they read of the
            environment when they are loaded is this test's.
    """
    ready, log = folder / "ready.json", folder / "log.jsonl"
    command = ["--listen", "127.0.0.1:0", "--ready-file", str(ready)]
    if "--drain-timeout-s" not in flags:
        # A refused step leaves gradients, whose step no test waits for.
        command += ["--drain-timeout-s", "1"]
    process: ForkedDaemon | subprocess.Popen[bytes]
    on_cuda = any("cuda" in said for said in (*flags, os.environ.get("TRUNKD_DEVICE", "")))
    if forked and not on_cuda:
        process = ForkedDaemon([*command, *flags], log)
    else:
        with log.open("wb") as sink:
            whole = [sys.executable, "-m", "trunk_service", *command, *flags]
            process = subprocess.Popen(whole, stderr=sink)
    pause = threading.Event()
    while not ready.exists():
        assert process.poll() is None, log.read_text(encoding="utf-8")
        pause.wait(0.02)
    return Daemon(process, json.loads(ready.read_text(encoding="utf-8")), log)


@pytest.fixture(scope="session")
def trunkd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Daemon]]:
    """Starts daemons by their flags, a few alive at a time; ends them with the tests."""
    alive: dict[tuple[str, ...], Daemon] = {}
    started: list[Daemon] = []

    def start(*flags: str) -> Daemon:
        # Most recently used last. No test uses as many at once; all of them would fill the memory.
        daemon = alive.pop(flags, None) or start_daemon(tmp_path_factory.mktemp("trunkd"), *flags)
        alive[flags] = daemon
        if daemon not in started:
            started.append(daemon)
        if len(alive) > MAX_ALIVE:
            alive.pop(next(iter(alive))).process.terminate()
        return daemon

    yield start
    for daemon in alive.values():
        daemon.process.terminate()
    # A test may have ended its daemon itself; none may have crashed.
    assert [d.process.wait(timeout=PATIENCE_S) for d in started] == [0] * len(started)


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2, the same folder for all tests: so they share its daemons."""
    return save_tiny_model("gpt2", tmp_path_factory.mktemp("tiny") / "gpt2")


@pytest.fixture
def bundled_trunk(trunkd: Callable[..., Daemon]) -> Daemon:
    """A daemon that serves the bundled model."""
    return trunkd("--session-held-bytes", "1000000000")
