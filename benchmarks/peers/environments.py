"""Virtual environments of other libraries, which do not go into ours: made here, kept, reused."""

from __future__ import annotations

import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.peers.running import SystemFailedError

LOG = logging.getLogger("benchmarks")
HERE = Path(__file__).parent
CONSTRAINTS = HERE.parents[1] / "constraints.txt"
INSTALL_TIMEOUT_S = 1800


def python_of(library: str) -> Path:
    """The interpreter of an environment with the pinned requirements of ``LIBRARY.txt``.

    What a library leaves open is as in ``constraints.txt``; more flags for pip, as ``make setup``
    takes them, come from the environment's ``PIP_FLAGS``.

    Raises:
        SystemFailedError: If they cannot be installed; has pip's last words.
    """
    requirements = HERE / f"{library}.txt"
    folder = HERE / f".venv-{library}"
    python, mark = folder / "bin" / "python", folder / "installed"
    pinned = requirements.read_bytes() + CONSTRAINTS.read_bytes()
    wanted = hashlib.sha256(pinned).hexdigest()
    if mark.is_file() and mark.read_text(encoding="utf-8") == wanted:
        return python
    LOG.info("installing %s", library)
    shutil.rmtree(folder, ignore_errors=True)
    _run(library, sys.executable, "-m", "venv", str(folder))
    pip = (str(python), "-m", "pip", "install", "--disable-pip-version-check")
    flags = shlex.split(os.environ.get("PIP_FLAGS", ""))
    _run(library, *pip, *flags, "-c", str(CONSTRAINTS), "-r", str(requirements))
    mark.write_text(wanted, encoding="utf-8")
    return python


def _run(library: str, *command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SystemFailedError(f"{library} cannot be installed: {error}") from error
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["no message"]
        raise SystemFailedError(f"{library} cannot be installed: {said[-1]}")
