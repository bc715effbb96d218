"""A client that opens, forwards and is killed: ``python -m tests.chaos.dying_client ADDRESS``."""

from __future__ import annotations

import os
import signal
import sys

from tests.chaos.raw import RawSession

if __name__ == "__main__":
    session = RawSession(sys.argv[1])
    session.open()
    session.send_held_forward("never asked for again")
    session.receive()
    os.kill(os.getpid(), signal.SIGKILL)
