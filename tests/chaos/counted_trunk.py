"""The trunk daemon, which counts on SIGUSR1 what is alive in it, and says if it is at rest.

The counts are those of Python objects that can be reached; ``CHAOS_COUNTS`` names the file.
"""

from __future__ import annotations

import gc
import json
import os
import signal
from pathlib import Path
from typing import Any

import torch

from trunk_service.__main__ import main
from trunk_service.registry import OpenSession, SessionRegistry

_registries: list[SessionRegistry] = []  # found here, since what a daemon begins with is frozen


def _count(number: int, frame: object) -> None:
    gc.collect()
    # By type(), not isinstance(): some objects import a module when they are asked their class.
    kinds = [type(found) for found in gc.get_objects()]
    counts = {
        "sessions": sum(issubclass(kind, OpenSession) for kind in kinds),
        "tensors": sum(issubclass(kind, torch.Tensor) for kind in kinds),
        "at_rest": all(_is_at_rest(registry) for registry in _registries),
    }
    path = Path(os.environ["CHAOS_COUNTS"])
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(counts), encoding="utf-8")
    temporary.replace(path)


def _is_at_rest(registry: SessionRegistry) -> bool:
    """Whether nothing is computed, and memory went back since anything was."""
    scheduler = registry.scheduler
    return scheduler.idle and registry._completed_at_trim == scheduler.completed


def _observed() -> None:
    begin = SessionRegistry.__init__

    def noted(registry: SessionRegistry, *given: Any) -> None:
        begin(registry, *given)
        _registries.append(registry)

    SessionRegistry.__init__ = noted  # type: ignore[method-assign]


if __name__ == "__main__":
    _observed()
    signal.signal(signal.SIGUSR1, _count)
    main()
