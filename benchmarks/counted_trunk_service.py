"""The trunk daemon, which counts on SIGUSR1 the bytes of the tensors that are alive in it.

``COUNTED_BYTES`` names the file for the count. Tensors that share their memory count once.
"""

from __future__ import annotations

import gc
import os
import signal
from pathlib import Path

import torch

from trunk_service.__main__ import main


def _count(number: int, frame: object) -> None:
    gc.collect()
    # By type(), not isinstance(): some objects import a module when they are asked their class.
    tensors = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]
    storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}
    path = Path(os.environ["COUNTED_BYTES"])
    temporary = path.with_suffix(".new")
    temporary.write_text(str(sum(storages.values())), encoding="utf-8")
    temporary.replace(path)


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, _count)
    main()
