"""The short form of every experiment; ``python -m tests.chaos all`` runs the long ones."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.chaos.__main__ import EXPERIMENTS
from tests.chaos.processes import ROOT

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_bounds_hold(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.chaos", name, "--short"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=170,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["ok"]
