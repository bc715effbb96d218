"""A thread that does nothing to the machine for a while, whatever library code it runs.

PEFT compiles an extension with the system's compiler when one of its methods is first used; what a
tenant chooses must not start processes, write files or open connections on the host. Python tells
of all of these before it does them (PEP 578), so they are refused there.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Any

_REFUSED = (
    *("subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork"),
    *("os.chmod", "os.chown", "os.link", "os.symlink"),
    *("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate", "os.utime"),
    *("shutil.", "socket.", "urllib.", "ftplib.", "tempfile."),
)
_READING = ("r", "rb", "rt", None)

_here = threading.local()


@contextlib.contextmanager
def sealed() -> Iterator[None]:
    """While it lasts, this thread raises ``PermissionError`` where it would do such a thing.

    Installed code may still be read, since libraries import parts of themselves late.
    """
    before = getattr(_here, "on", False)
    _here.on = True
    try:
        yield
    finally:
        _here.on = before


def _refuse(event: str, args: tuple[Any, ...]) -> None:
    if not getattr(_here, "on", False):
        return
    if event.startswith(_REFUSED) or (event == "open" and not _reads_code(*args[:2])):
        raise PermissionError(f"building an adapter does nothing to this machine: no {event}")


def _reads_code(path: object, mode: object) -> bool:
    name = path.decode(errors="replace") if isinstance(path, bytes) else str(path)
    return mode in _READING and name.startswith((sys.prefix, sys.base_prefix))


sys.addaudithook(_refuse)
