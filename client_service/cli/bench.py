"""``trunkline bench``: the benchmarks of a checkout."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import typer

from client_service.cli import app
from shared.errors import InvalidInputError

_TAKES_ALL = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


@app.command("bench", context_settings=_TAKES_ALL)
def bench_command(context: typer.Context) -> None:
    """Measure the split beside the whole model and other systems; --help lists what there is."""
    if not Path("benchmarks/__main__.py").is_file():
        raise InvalidInputError(
            "there is no folder benchmarks/ here: run this in a checkout of the project, the "
            "benchmarks are not part of the package"
        )
    command = [sys.executable, "-m", "benchmarks", *context.args]
    # Both sides share the cores: an idle one must not spin (shared.openmp).
    environment = {"OMP_WAIT_POLICY": "PASSIVE"} | os.environ
    raise typer.Exit(subprocess.run(command, env=environment, check=False).returncode)
