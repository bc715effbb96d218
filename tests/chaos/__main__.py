"""``python -m tests.chaos NAME [--short]``: one experiment, or ``all`` of them.

Prints one line of JSON for each experiment. Exits 1 if one of its bounds is broken; then its files
stay where the line says.
"""

from __future__ import annotations

import argparse
import importlib
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests.chaos.options import Options
from tests.chaos.report import BrokenError, Report
from tests.chaos.stage import set_stage

EXPERIMENTS = ("kills", "stop", "drain", "die", "greedy", "canary")


def main() -> None:
    """Runs what the command line names."""
    parser = argparse.ArgumentParser(prog="tests.chaos", description=__doc__)
    parser.add_argument("name", choices=[*EXPERIMENTS, "all"])
    parser.add_argument("--short", action="store_true", help="a minute of it, no times judged")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn by chance")
    parser.add_argument("--kills", type=int, help="kills: how many; 200, short 8")
    parser.add_argument("--steps", type=int, help="kills: optimizer steps; 500, short 40")
    parser.add_argument("--cycles", type=int, help="die: how many; 2000, short 300")
    parser.add_argument("--keep", type=Path, help="folder in which all files stay")
    given = parser.parse_args()
    # Ends as an exception, so that the processes of the experiment are ended too.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    options = Options(given.short, given.seed, given.kills, given.steps, given.cycles)
    names = EXPERIMENTS if given.name == "all" else (given.name,)
    held = [_run(name, options, given.keep) for name in names]
    sys.exit(0 if all(held) else 1)


def _run(name: str, options: Options, keep: Path | None) -> bool:
    """Runs an experiment and prints its line; returns whether its bounds held."""
    report = Report(name, timed=not options.short)
    if keep:
        keep.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"chaos-{name}-", dir=keep))
    started = time.monotonic()
    try:
        with set_stage(folder) as stage:
            importlib.import_module(f"tests.chaos.{name}").run(stage, options, report)
    except BrokenError as error:
        report.require(False, str(error))
    report.note(short=options.short, seed=options.seed, took_s=round(time.monotonic() - started, 1))
    if keep or report.broken:
        report.note(files=str(folder))
    else:
        shutil.rmtree(folder)
    sys.stdout.write(report.line() + "\n")
    sys.stdout.flush()
    return not report.broken


if __name__ == "__main__":
    main()
