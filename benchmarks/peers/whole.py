"""The unsplit model: what everything else is compared with; perhaps with oneDNN's layers."""

from __future__ import annotations

from benchmarks.peers.driving import task
from benchmarks.peers.models import local_step, whole
from benchmarks.processes import pin


def main() -> None:
    given = task("core", "onednn")
    if given.options.core is not None:
        pin([given.options.core])
    given.serve(local_step(whole(given.model, given.adapter, bool(given.options.onednn))))


if __name__ == "__main__":
    main()
