"""``make bench``: every benchmark, or some, written to ``benchmarks/results``.

Every figure is a ratio within one run of one machine. ``python -m benchmarks [NAME …]`` runs those
named; what was measured before of the others stays. ``--e2e FOLDER`` names a folder with the E2E
NLG data for the comparison of losses; without, it runs on the bundled notes.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import cost, decoding, device, links, loss, memory, step, tenants, wire
from benchmarks.report import Section

LOG = logging.getLogger("benchmarks")
RESULTS = Path(__file__).parent / "results"
ORDER = (
    "step",
    "faster",
    "installed",
    "cost",
    "wire",
    "loss",
    "links",
    "tenants",
    "memory",
    "decoding",
    "device",
)


def main() -> None:
    """Runs benchmarks one after another and writes what they found."""
    logging.basicConfig(level="INFO", format="%(message)s")
    # As an interrupt does: unwinds, and so ends the processes that were started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    parser = argparse.ArgumentParser(
        description=__doc__,
        prog="trunkline bench",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(ORDER)}")
    parser.add_argument("--quick", action="store_true", help="few repetitions")
    parser.add_argument("--no-peers", action="store_true", help="install and run no peer")
    parser.add_argument("--e2e", type=Path, help="folder with e2e/ and gpt2-tokenizer/")
    given = parser.parse_args()
    if unknown := sorted(set(given.names) - set(ORDER)):
        parser.error(f"{', '.join(unknown)}: no such benchmark; there are {', '.join(ORDER)}")
    has_device = torch.cuda.is_available()
    if "device" in given.names and not has_device:
        parser.error("device: torch finds no CUDA device here")
    RESULTS.mkdir(exist_ok=True)
    runs = _runs(given)
    for name in given.names or [name for name in ORDER if name != "device" or has_device]:
        LOG.info("%s …", name)
        started = time.monotonic()
        sections = runs[name]()
        _write(name, sections, time.monotonic() - started, given.quick)
        LOG.info("%s", "\n".join(s.as_markdown() for s in sections))
    _write_table()


def _runs(given: argparse.Namespace) -> dict[str, Callable[[], list[Section]]]:
    quick, peers = given.quick, not given.no_peers
    return {
        "step": lambda: step.measure(peers, 5 if quick else 15),
        "faster": lambda: step.measure_faster(5 if quick else 15),
        "installed": lambda: step.measure_installed(5 if quick else 15),
        "cost": lambda: cost.measure(quick),
        "wire": lambda: wire.measure(quick),
        "loss": lambda: loss.measure(quick, given.e2e),
        "links": lambda: links.measure(quick),
        "tenants": lambda: tenants.measure(quick),
        "memory": lambda: memory.measure(quick),
        "decoding": lambda: decoding.measure(quick),
        "device": lambda: device.measure(quick),
    }


def machine() -> str:
    """What the figures were taken on."""
    facts = [platform.machine(), f"{len(os.sched_getaffinity(0))} cores"]
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            facts.insert(0, line.partition(":")[2].strip())
            break
    if torch.cuda.is_available():
        facts.append(torch.cuda.get_device_name())
    return ", ".join([*facts, f"torch {torch.__version__}", f"Python {platform.python_version()}"])


def _write(name: str, sections: list[Section], took_s: float, quick: bool) -> None:
    found: dict[str, Any] = {
        "machine": machine(),
        "quick": quick,
        "seconds": round(took_s),
        "sections": {section.name: section.as_dict() for section in sections},
        "markdown": "\n".join(section.as_markdown() for section in sections),
    }
    text = json.dumps(found, indent=2, ensure_ascii=False) + "\n"
    (RESULTS / f"{name}.json").write_text(text, encoding="utf-8")


def _write_table() -> None:
    """One page of all results there are."""
    lines = ["# What was measured", "", "Written by `make bench`; each part is one run.", ""]
    for name in ORDER:
        file = RESULTS / f"{name}.json"
        if not file.is_file():
            continue
        found = json.loads(file.read_text(encoding="utf-8"))
        quick = ", quick" if found["quick"] else ""
        lines += [f"<!-- {name} -->", f"*{found['machine']}; {found['seconds']} s{quick}*", ""]
        lines += [found["markdown"], ""]
    (RESULTS / "README.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
