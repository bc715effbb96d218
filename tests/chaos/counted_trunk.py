"""The trunk daemon, which counts on SIGUSR1 what is alive in it.

The counts are those of Python objects that can be reached; ``CHAOS_COUNTS`` names the file.
"""

from __future__ import annotations

import gc
import json
import os
import signal
from pathlib import Path

import torch

from trunk_service.__main__ import main
from trunk_service.registry import OpenSession


def _count(number: int, frame: object) -> None:
    gc.collect()
    # By type(), not isinstance(): some objects import a module when they are asked their class.
    kinds = [type(found) for found in gc.get_objects()]
    counts = {
        "sessions": sum(issubclass(kind, OpenSession) for kind in kinds),
        "tensors": sum(issubclass(kind, torch.Tensor) for kind in kinds),
    }
    path = Path(os.environ["CHAOS_COUNTS"])
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(counts), encoding="utf-8")
    temporary.replace(path)


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, _count)
    main()
