"""The short form of every experiment, which judges no times.

``python -m tests.chaos all`` runs the long ones, which do.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.chaos.__main__ import EXPERIMENTS
from tests.chaos.processes import ROOT
from tests.patience import PATIENCE_S

_TIMEOUT_S = 3600.0  # of one experiment, which waits for many things

pytestmark = [pytest.mark.slow, pytest.mark.timeout(_TIMEOUT_S + PATIENCE_S)]


def run(*command: str) -> Any:
    """What an experiment printed; it has exited 0."""
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    arguments = [sys.executable, "-m", *command]
    with subprocess.Popen(arguments, cwd=ROOT, text=True, **pipes) as experiment:
        try:
            said, complained = experiment.communicate(timeout=_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            experiment.terminate()  # it ends its own processes, which a kill would leave behind
            said, complained = experiment.communicate()
    assert experiment.returncode == 0, said + complained
    return json.loads(said)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_bounds_hold(name: str) -> None:
    assert run("tests.chaos", name, "--short")["ok"]


def test_no_schedule_loses_or_doubles_a_step() -> None:
    found = run("tests.chaos.schedules", "1000")
    assert found["schedules"] >= 1000 and found["steps"] and found["asked_again"]
