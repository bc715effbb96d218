"""Daemons that are forked from a process which has loaded what they load.

Most of a daemon's start, five seconds on two cores, is the import of its libraries. Here they are
imported once, in a process that does nothing else; each daemon is a fork of it with a command line
and a log of its own, which runs ``trunkd`` from there as ever, but for the interpreter's own end.
Tests of that, of memory and of commands start a program instead, and so do all tests on a CUDA
device, which a fork cannot use.
"""

from __future__ import annotations

import atexit
import multiprocessing
import multiprocessing.util  # registers its own end, which is to come after ours
import os
import signal
import subprocess
import sys
from pathlib import Path

_started: list[ForkedDaemon] = []
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["trunk_service.__main__", __name__])


class ForkedDaemon:
    """A ``trunkd``, with what tests use of :class:`subprocess.Popen`.

    Args:
        flags: Its command line.
        log: A file for what it writes to standard error.
    """

    def __init__(self, flags: list[str], log: Path) -> None:
        log.write_bytes(b"")
        given = (flags, str(log), dict(os.environ))
        self._process = _FORKS.Process(target=_run, args=given, daemon=True)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid
        _started.append(self)

    def poll(self) -> int | None:
        """Its exit status, or None while it runs; if a signal ended it, the negative number."""
        return self._process.exitcode

    def wait(self, timeout: float) -> int:
        """Its exit status.

        Raises:
            subprocess.TimeoutExpired: If it still runs after so many seconds.
        """
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("trunkd", timeout)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Sends it a signal, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Asks it to end."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Ends it at once."""
        self.send_signal(signal.SIGKILL)


def _run(flags: list[str], log: str, environment: dict[str, str]) -> None:
    from trunk_service.__main__ import main

    os.environ.clear()
    os.environ.update(environment)
    sink = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(sink, 2)
    sys.argv = ["trunkd", *flags]
    main()


@atexit.register
def _end_all() -> None:
    """Before multiprocessing asks them to, which waits for as long as a daemon drains."""
    for daemon in _started:
        daemon.kill()
