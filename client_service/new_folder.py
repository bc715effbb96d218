"""A folder that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shared.errors import CheckpointError


def check_new(out: Path) -> None:
    """Refuses a place where something is already.

    Raises:
        CheckpointError: If it is a file, or a folder with anything in it.
    """
    if (out.exists() or out.is_symlink()) and not (out.is_dir() and not any(out.iterdir())):
        raise CheckpointError(f"{out} exists and is not an empty folder; choose another")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yields a folder to write to, which becomes ``out`` at the end and is removed on an error.

    It lies beside ``out``, on the same disk, so that the last step is one rename.

    Raises:
        CheckpointError: If ``out`` exists and is not an empty folder, or cannot be made.
    """
    check_new(out)
    out = out.absolute()
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be made ({error})") from error
    try:
        yield partial
        check_new(out)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
