"""Checkpoint folders: each whole or refused by name, the newest whole one found, old ones removed.

``step-00000120/`` is written beside its place; its manifest, with the size and SHA-256 of every
other file, comes last. So a folder with a manifest that fits is whole, whatever happened.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save

from client_service.atomic_folder import (
    partial_folder,
    put_in_place,
    remove_folder,
    sync_folder,
    write_file,
)
from shared.errors import CheckpointError
from shared.failpoints import reach
from shared.models.tensor_files import first_line

logger = logging.getLogger(__name__)

FORMAT = 2
MANIFEST = "manifest.json"

_FOLDER = re.compile(r"step-(\d{8,})")
_CHUNK = 1024 * 1024

Content = Mapping[str, Any]
"""Of one file: tensors by name for ``.safetensors``, else what JSON takes."""


@dataclass(frozen=True)
class FileEntry:
    """A file as it was written."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself."""

    format: int
    step: int
    weight_digest: str
    """Of the trunk's base weights."""
    split: str
    files: dict[str, FileEntry]


def step_folder(parent: Path, step: int) -> Path:
    """The place of a step's checkpoint."""
    return parent / f"step-{step:08d}"


def write_checkpoint(
    parent: Path, step: int, weight_digest: str, split: str, contents: Mapping[str, Content]
) -> Path:
    """Writes one checkpoint, whole or not at all.

    Args:
        parent: Folder of all checkpoints; made if needed.
        step: That was done last.
        weight_digest: Of the trunk's base weights.
        split: Of the model.
        contents: By file name.

    Returns:
        Its folder.

    Raises:
        CheckpointError: If the disk refused; names the checkpoint that is whole.
    """
    place = step_folder(parent.absolute(), step)
    partial = partial_folder(place)
    try:
        reach("client.checkpoint.before")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        files = {}
        for name, content in contents.items():
            reach("client.checkpoint.file")
            files[name] = _write(partial / name, content)
        reach("client.checkpoint.manifest")
        manifest = Manifest(FORMAT, step, weight_digest, split, files)
        _write(partial / MANIFEST, asdict(manifest))
        sync_folder(partial)
        reach("client.checkpoint.rename")
        put_in_place(partial, place)
        reach("client.checkpoint.after")
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"{place}: was not saved ({first_line(error)}); {_previous(parent, step)}"
        ) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return place


def keep_last(parent: Path, step: int, count: int) -> None:
    """Removes all but the last checkpoints up to this step's, which must be in place.

    Later ones are there only if they were damaged and passed over; they are replaced in time.
    """
    older = [folder for number, folder in _found(parent) if number < step]
    for folder in older[: max(0, len(older) - (count - 1))]:
        try:
            remove_folder(folder)
        except OSError as error:
            logger.warning("%s: an old checkpoint was not removed (%s)", folder, error)


def newest_whole(parent: Path, weight_digest: str, split: str) -> tuple[Path, Manifest] | None:
    """The newest checkpoint that is whole and of these weights; None if there is none at all.

    Args:
        parent: Folder of all checkpoints.
        weight_digest: Of the trunk's base weights.
        split: Of the model.

    Raises:
        CheckpointError: If there are some and none can be used; says why of each.
    """
    damaged = []
    for _, folder in reversed(_found(parent)):
        try:
            return folder, read_manifest(folder, weight_digest, split)
        except CheckpointError as error:
            logger.warning("passed over: %s", error)
            damaged.append(str(error))
    if damaged:
        raise CheckpointError(f"{parent}: no checkpoint can be used: {'; '.join(damaged)}")
    return None


def has_checkpoints(parent: Path) -> bool:
    """Tells whether there are any, whole or not."""
    return bool(_found(parent))


def read_manifest(folder: Path, weight_digest: str, split: str) -> Manifest:
    """Checks every byte of a checkpoint.

    Args:
        folder: Of the checkpoint.
        weight_digest: Expected of the trunk's base weights.
        split: Expected of the model.

    Raises:
        CheckpointError: Names the file that is missing, cut or changed, or what is foreign.
    """
    manifest = _manifest(folder)
    if step_folder(folder.parent, manifest.step) != folder:
        raise CheckpointError(f"{folder / MANIFEST}: is of step {manifest.step}")
    for name, entry in manifest.files.items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise CheckpointError(f"{path}: is missing")
        if (size := path.stat().st_size) != entry.size:
            raise CheckpointError(f"{path}: has {size} bytes, {entry.size} were written")
        if _sha256(path) != entry.sha256:
            raise CheckpointError(f"{path}: was changed: its SHA-256 is not the manifest's")
    if manifest.weight_digest != weight_digest:
        raise CheckpointError(
            f"{folder}: belongs to trunk weights {manifest.weight_digest[:16]}…, this trunk serves "
            f"{weight_digest[:16]}…"
        )
    if manifest.split != split:
        raise CheckpointError(f"{folder}: is split {manifest.split}, this model {split}")
    return manifest


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Reads a file of tensors.

    Raises:
        CheckpointError: If it is missing or none.
    """
    try:
        tensors: dict[str, torch.Tensor] = load(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not readable ({first_line(error)})") from error
    return tensors


def read_json(path: Path) -> Any:
    """Reads a file of JSON.

    Raises:
        CheckpointError: If it is missing or none.
    """
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable ({first_line(error)})") from error


def _manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{path}: is missing")
    fields = read_json(path)
    if isinstance(fields, dict) and fields.get("format", FORMAT) != FORMAT:
        raise CheckpointError(f"{path}: format {fields['format']!r}; this program reads {FORMAT}")
    try:
        return TypeAdapter(Manifest).validate_python(fields)
    except ValidationError as error:
        raise CheckpointError(f"{path}: is no manifest ({first_line(error)})") from error


def _write(path: Path, content: Content) -> FileEntry:
    if path.suffix == ".safetensors":
        # A copy: safetensors refuses tensors that share their memory.
        data = save({n: t.detach().cpu().clone().contiguous() for n, t in content.items()})
    else:
        data = json.dumps(content, indent=1).encode()
    write_file(path, data)
    return FileEntry(len(data), hashlib.sha256(data).hexdigest())


def _previous(parent: Path, step: int) -> str:
    for number, folder in reversed(_found(parent)):
        if number >= step:
            continue
        try:
            manifest = _manifest(folder)
            read_manifest(folder, manifest.weight_digest, manifest.split)
        except CheckpointError:
            continue
        return f"the previous checkpoint {folder.name} is whole"
    return "there is no checkpoint before it"


def _found(parent: Path) -> list[tuple[int, Path]]:
    """Checkpoints by step, whole or not."""
    if not parent.is_dir():
        return []
    names = ((_FOLDER.fullmatch(path.name), path.absolute()) for path in parent.iterdir())
    return sorted((int(match[1]), path) for match, path in names if match)


def _sha256(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()
