"""The short form of every experiment; ``python -m tests.chaos all`` runs the long ones."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.chaos.__main__ import EXPERIMENTS
from tests.chaos.processes import ROOT

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", [*EXPERIMENTS, "schedules"])
def test_the_bounds_hold(name: str) -> None:
    command = ["tests.chaos", name, "--short"] if name in EXPERIMENTS else [f"tests.chaos.{name}"]
    command = [sys.executable, "-m", "tests.chaos", name, "--short"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as experiment:
        try:
            said, complained = experiment.communicate(timeout=170)
        except subprocess.TimeoutExpired:
            experiment.terminate()  # it ends its own processes, which a kill would leave behind
            said, complained = experiment.communicate()
    assert experiment.returncode == 0, said + complained
    assert json.loads(said)["ok"]
