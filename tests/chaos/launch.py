"""``trunkline`` that says when its libraries are loaded: ``python -m tests.chaos.launch FILE …``.

Most of a start is imports. What an experiment calls recovery begins after them. A training run
passes the gate of ``CHAOS_GATE`` before each of its steps.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

from client_service.cli import main
from tests.chaos.gate import VARIABLE, Gate, one_by_one

if __name__ == "__main__":
    command: Any = importlib.import_module("client_service.cli.train")
    gate, train = Gate(Path(os.environ[VARIABLE])), command.train
    command.train = lambda *given: one_by_one(gate, train(*given))
    Path(sys.argv.pop(1)).touch()
    main()
