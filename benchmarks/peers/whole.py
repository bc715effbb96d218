"""The unsplit model: what everything else is compared with.

``--onednn 1`` has its linear layers by oneDNN; ``--keep 1`` keeps the memory that a step frees.
"""

from __future__ import annotations

from benchmarks.peers.driving import task
from benchmarks.peers.models import local_step, whole
from benchmarks.processes import pin
from shared.freed_memory import keep_freed_memory


def main() -> None:
    given = task("core", "onednn", "keep")
    if given.options.keep:
        keep_freed_memory()
    if given.options.core is not None:
        pin([given.options.core])
    given.serve(local_step(whole(given.model, given.adapter, bool(given.options.onednn))))


if __name__ == "__main__":
    main()
