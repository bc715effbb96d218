"""A greedy client that holds all it forwards: ``python -m tests.chaos.flood ADDRESS TLS GATE``.

It goes on while the gate is open, never sends a backward, takes no notice of a refusal and asks
again at once. Every so many answers it writes what they were.
"""

from __future__ import annotations

import collections
import itertools
import json
import os
import sys
from pathlib import Path

from client_service.credentials import Credentials
from shared.pb.trunkline.v1 import trunk_pb2 as pb
from tests.chaos.gate import Gate
from tests.chaos.raw import RawSession

# As many as the trunk reads at once of one session, so that it never waits for this client.
_WINDOW = 32
_SAID_EVERY = 10
# Its own computing is not what is measured: it gets what the others leave.
_NICENESS = 19


def flood(session: RawSession, gate: Gate) -> None:
    counts: collections.Counter[str] = collections.Counter()
    for number in range(_WINDOW):
        session.send_held_forward(str(number), with_adapter=number == 0)
    for number in itertools.count(_WINDOW):
        answer = session.receive()
        refused = answer.WhichOneof("body") == "error"
        counts[pb.ErrorCode.Name(answer.error.code) if refused else "OK"] += 1
        if number % _SAID_EVERY == 0:
            sys.stdout.write(json.dumps(counts) + "\n")
            sys.stdout.flush()
        gate.wait(1)
        session.send_held_forward(str(number), with_adapter=False)


if __name__ == "__main__":
    os.nice(_NICENESS)
    greedy = RawSession(sys.argv[1], Credentials(Path(sys.argv[2])))
    greedy.open()
    flood(greedy, Gate(Path(sys.argv[3])))
