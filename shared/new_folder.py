"""A folder that appears whole or not at all, and the refusal of places where none can."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from shared.errors import CheckpointError, TrunklineError
from shared.models.tensor_files import first_line


def check_new(out: Path) -> None:
    """Refuses a place where something is already, or where nothing can be written.

    Raises:
        CheckpointError: If it is a file, a folder with anything in it, or cannot be written to.
    """
    try:
        taken = os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir()))
    except OSError as error:
        raise CheckpointError(f"{out}: {error.strerror}; choose another folder") from error
    if taken:
        raise CheckpointError(f"{out} exists and is not an empty folder; choose another")
    check_writable(out)


def check_writable(folder: Path) -> None:
    """Refuses a place where no folder can be made or no file be written; leaves nothing there.

    Raises:
        CheckpointError: Says why.
    """
    made = _missing(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CheckpointError(
            f"{folder}: cannot be written to ({error.strerror}); accepted is a folder, or a place "
            f"for a new one, that you may write to"
        ) from error
    finally:
        _remove_empty(made)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yields a folder to write to, which becomes ``out`` at the end and is removed on an error.

    It lies beside ``out``, on the same disk, so that the last step is one rename. An empty ``out``
    that is there already may be a mounted volume, whose place cannot be taken: it is kept, and what
    was written is moved into it, in the order in which it was finished.

    Raises:
        CheckpointError: If ``out`` exists and is not an empty folder, or the disk refuses what is
            written; nothing of it is left then.
    """
    check_new(out)
    out = out.absolute()
    is_there = out.is_dir()
    partial = (out if is_there else out.parent) / f".{out.name}.{os.getpid()}.partial"
    made = _missing(out.parent)
    try:
        partial.mkdir(parents=True)
        yield partial
        if is_there:
            _move_up(partial)
        else:
            partial.rename(out)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        _remove_empty(made)
        if is_of_the_disk(error):
            raise CheckpointError(
                f"{out}: was not written ({first_line(error)}), and nothing is left of it; make "
                f"room or choose another folder"
            ) from error
        raise


def is_of_the_disk(error: BaseException) -> bool:
    """Whether an error is what a library raises when a file cannot be written or read."""
    if isinstance(error, TrunklineError):
        return False  # some are OSErrors too
    # Of tokenizers' Rust code, a full disk is a bare Exception.
    return isinstance(error, OSError | SafetensorError) or type(error) is Exception


def _move_up(folder: Path) -> None:
    """Puts what is in a folder in its place; all of it, or the disk's error and nothing moved."""
    entries = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    moved: list[Path] = []
    try:
        for entry in entries:
            moved.append(entry.rename(folder.parent / entry.name))
        folder.rmdir()
    except BaseException:
        for entry in moved:
            entry.rename(folder / entry.name)
        raise


def _missing(folder: Path) -> list[Path]:
    """The folders that making this one would make, the innermost first."""
    folder = folder.absolute()
    return [path for path in (folder, *folder.parents) if not os.path.lexists(path)]


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()
