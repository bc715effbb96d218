"""Files and folders that appear whole or not at all, also if the machine loses its power.

What is not in place yet, or not wanted any more, has a name with a leading dot beside its place: a
process that is killed leaves such names behind, and :func:`remove_leftovers` removes them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL, REMOVED = ".partial", ".removed"


def write_file(path: Path, data: bytes) -> None:
    """Writes a file and waits until the disk has it.

    Raises:
        OSError: As the disk says.
    """
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, data: bytes) -> None:
    """Puts a file in the place of another, or of none, in one step.

    Raises:
        OSError: As the disk says; the file is then as it was.
    """
    partial = _beside(path, PARTIAL)
    try:
        write_file(partial, data)
        partial.rename(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Waits until the disk has the names in a folder.

    Raises:
        OSError: As the disk says.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replaced_folder(place: Path) -> Iterator[Path]:
    """Yields an empty folder to write to, which takes a folder's place at the end.

    On an error it is removed, and what was in the place is still there.

    Args:
        place: Of the folder; its parent is made if needed.

    Raises:
        OSError: As the disk says.
    """
    place = place.absolute()
    partial = _beside(place, PARTIAL)
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        yield partial
        for file in (p for p in partial.rglob("*") if p.is_file()):
            _sync_file(file)
        sync_folder(partial)
        put_in_place(partial, place)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def put_in_place(partial: Path, place: Path) -> None:
    """Renames a finished folder to its place; one that was there is removed afterwards.

    Raises:
        OSError: As the disk says; what was in the place is still there.
    """
    old = None
    if place.exists():
        old = _beside(place, REMOVED)
        shutil.rmtree(old, ignore_errors=True)
        place.rename(old)
    try:
        partial.rename(place)
    except BaseException:
        if old is not None:
            old.rename(place)
        raise
    sync_folder(place.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Removes a folder that others may look for: at no moment half of it is there.

    Raises:
        OSError: As the disk says.
    """
    hidden = _beside(folder, REMOVED)
    shutil.rmtree(hidden, ignore_errors=True)
    folder.rename(hidden)
    shutil.rmtree(hidden)


def remove_leftovers(folder: Path) -> None:
    """Removes what killed processes left in a folder; no other may be writing there."""
    for suffix in (PARTIAL, REMOVED):
        for path in folder.glob(f".*{suffix}"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def partial_folder(place: Path) -> Path:
    """The name under which a folder is written until it is whole."""
    return _beside(place, PARTIAL)


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}{suffix}")


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
