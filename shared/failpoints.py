"""Places where a test makes a process fail, named before and after every change of state.

Off unless ``TRUNKLINE_FAILPOINTS`` is set when the process starts, as ``NAME=ACTION[@N]`` with
commas between several: at the N-th time (the first without ``@N``) that the place is reached, the
process is killed as the system would (``kill``), finds the disk full (``enospc``) or no memory
(``memory``).
"""

from __future__ import annotations

import errno
import os
import signal
import threading
from dataclasses import dataclass

from shared.errors import InvalidInputError

VARIABLE = "TRUNKLINE_FAILPOINTS"

TRUNK_FAILPOINTS = (
    "trunk.open.before",
    "trunk.open.after",
    "trunk.forward.before",
    "trunk.forward.after",
    "trunk.backward.before",
    "trunk.backward.after",
    "trunk.fetch.before",
    "trunk.fetch.after",
    "trunk.answer.before",
    "trunk.answer.after",
)
CLIENT_FAILPOINTS = (
    "client.forward.before",
    "client.forward.after",
    "client.backward.before",
    "client.backward.after",
    "client.step.before",
    "client.step.after",
    "client.optimizer.before",
    "client.optimizer.after",
    "client.checkpoint.before",
    "client.checkpoint.file",
    "client.checkpoint.manifest",
    "client.checkpoint.rename",
    "client.checkpoint.after",
)
ACTIONS = ("kill", "enospc", "memory")


@dataclass
class _Failpoint:
    action: str
    remaining: int


def parse(setting: str) -> dict[str, _Failpoint]:
    """Reads what the environment variable says.

    Raises:
        InvalidInputError: If a name or an action is unknown.
    """
    found: dict[str, _Failpoint] = {}
    for entry in filter(None, setting.split(",")):
        name, _, rest = entry.partition("=")
        action, _, count = rest.partition("@")
        known = name in TRUNK_FAILPOINTS + CLIENT_FAILPOINTS and action in ACTIONS
        if not known or not (count or "1").isdigit() or count == "0":
            raise InvalidInputError(
                f"{VARIABLE}: {entry!r} is not NAME=ACTION[@N]; actions: {', '.join(ACTIONS)}; "
                f"names: {', '.join(TRUNK_FAILPOINTS + CLIENT_FAILPOINTS)}"
            )
        found[name] = _Failpoint(action, int(count or "1"))
    return found


_set = parse(os.environ.get(VARIABLE, ""))
_lock = threading.Lock()


def reach(name: str) -> None:
    """Fails here if a test said so.

    Raises:
        OSError: No space left, where the action is ``enospc``.
        MemoryError: Where the action is ``memory``.
    """
    if not _set or (failpoint := _set.get(name)) is None:
        return
    with _lock:
        failpoint.remaining -= 1
        now = failpoint.remaining == 0
    if not now:
        return
    if failpoint.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif failpoint.action == "enospc":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    else:
        raise MemoryError(f"failpoint {name}")
