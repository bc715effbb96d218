"""``trunkline`` that says when its libraries are loaded: ``python -m tests.chaos.launch FILE …``.

Most of a start is imports. What an experiment calls recovery begins after them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import client_service.cli.train  # noqa: F401
from client_service.cli import main

if __name__ == "__main__":
    Path(sys.argv.pop(1)).touch()
    main()
