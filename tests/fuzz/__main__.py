"""``python -m tests.fuzz``: sends a trunk what no client would, and looks how it bears it."""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path

from tests.fuzz.campaign import Campaign, Report
from tests.fuzz.script import read_scripts
from tests.fuzz.watch import Watch, start_trunk
from tests.patience import PATIENCE_S


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0, help="how long to fuzz")
    parser.add_argument("--seed", type=int, default=random.randrange(2**31))
    parser.add_argument("--address", help="HOST:PORT of a trunk that serves tests/models.py's gpt2")
    parser.add_argument("--replay", type=Path, help="a file that a fault left")
    parser.add_argument("--out", type=Path, default=Path("runs/fuzz"), help="where to leave those")
    parser.add_argument("--keep-going", action="store_true", help="do not end with the first fault")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.address:
        report = _fuzz(arguments, arguments.address, None)
    else:
        with tempfile.TemporaryDirectory() as folder:
            daemon = start_trunk(Path(folder))
            watch = Watch(daemon)
            try:
                report = _fuzz(arguments, daemon.address, watch)
            finally:
                watch.close()
                daemon.process.terminate()
                daemon.process.wait(timeout=PATIENCE_S)
    sys.stdout.write(json.dumps(report.as_json(), indent=2) + "\n")
    return 1 if report.faults else 0


def _fuzz(arguments: argparse.Namespace, address: str, watch: Watch | None) -> Report:
    campaign = Campaign(address, watch, arguments.seed, arguments.out, arguments.keep_going)
    if arguments.replay is not None:
        return campaign.replay(read_scripts(arguments.replay))
    return campaign.run(arguments.seconds)


if __name__ == "__main__":
    sys.exit(main())
