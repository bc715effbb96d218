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
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", *command],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=170,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found.get("ok") or found["schedules"] >= 1000
