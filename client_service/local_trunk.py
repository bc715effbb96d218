"""A trunk daemon on this machine, as a process of its own, for a demonstration or a test run."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from shared.errors import TrunkUnavailableError

_POLL_S = 0.05


@contextmanager
def local_trunk(
    model: str,
    split: str,
    timeout_s: float = 120.0,
    flags: Sequence[str] = (),
    module: str = "trunk_service",
) -> Iterator[str]:
    """Starts ``python -m trunk_service`` on a free loopback port and yields its address.

    Args:
        model: Folder or hub id.
        split: Blocks ``START:END`` of the trunk.
        timeout_s: How long it may take to serve.
        flags: Further ones of the daemon.
        module: Another one to run as the daemon.

    Raises:
        TrunkUnavailableError: If the daemon ends or does not serve in time; has what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        ready, log = Path(folder) / "ready.json", Path(folder) / "log"
        command = [sys.executable, "-m", module, "--model", model, "--split", split]
        # Certificates in the environment are for another trunk than this one.
        command += ["--listen", "127.0.0.1:0", "--insecure", "--ready-file", str(ready)]
        command += flags
        with log.open("wb") as sink:
            process = subprocess.Popen(command, stderr=sink, stdin=subprocess.DEVNULL)
        try:
            yield _wait_ready(process, ready, log, timeout_s)
        finally:
            process.terminate()
            process.wait(timeout=60)


def _wait_ready(process: subprocess.Popen[bytes], ready: Path, log: Path, timeout_s: float) -> str:
    deadline = time.monotonic() + timeout_s
    while not ready.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            said = log.read_text(encoding="utf-8", errors="replace")[-2000:]
            raise TrunkUnavailableError(f"the trunk daemon does not serve; it said: {said}")
        time.sleep(_POLL_S)
    return str(json.loads(ready.read_text(encoding="utf-8"))["address"])
