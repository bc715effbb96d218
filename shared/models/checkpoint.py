"""A checkpoint as names and tensors, wherever its files are.

Three layouts are read: a Hugging Face folder or hub id (one file or sharded, safetensors first),
and the split layout that ``trunkline split`` writes (``bottom/``, ``trunk/``, ``top/``), of which a
side may have only its own parts. Names are canonical: those of the whole model's ``state_dict``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import cached_file

from shared.errors import CheckpointError
from shared.models.families import HEAD, Family, family_of
from shared.models.split_range import SplitRange
from shared.models.tensor_files import TensorFile, first_line, open_tensor_file

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

ENDS_TYPE = "trunkline_ends"
"""Model type of a folder of trained ends, which transformers does not know."""

# Causal masks (GPT-2, GPT-NeoX) and rotary frequencies, which are computed today.
_OLD_BUFFER = re.compile(r"\.(attn|attention)\.(masked_)?bias$|\.rotary_emb\.inv_freq$")

Opener = Callable[[], TensorFile]


class Checkpoint:
    """Tensors of a model by canonical name, read one at a time.

    Attributes:
        source: The folder or hub id, for messages.
        config: The whole model's configuration.
        family: The model's row in the family table.
        metadata: Per role, what the split layout says of its parts; empty for a whole checkpoint.
        folder: Local folder with the tokenizer, or the hub id.
    """

    def __init__(self, source: str, config: PreTrainedConfig, folder: str) -> None:
        self.source = source
        self.config = config
        self.family: Family = family_of(config.model_type)
        self.folder = folder
        self.metadata: dict[str, dict[str, Any]] = {}
        self._openers: dict[str, Opener] = {}
        self._files: dict[str, TensorFile] = {}
        self._where: dict[str, tuple[str, str]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def names(self) -> list[str]:
        """Canonical names of every tensor."""
        return sorted(self._where)

    def read(self, name: str) -> torch.Tensor:
        """Reads one tensor, as stored.

        Raises:
            CheckpointError: If the checkpoint has no such tensor, or its file is damaged.
        """
        if name not in self._where:
            raise CheckpointError(f"{self.source}: has no tensor {name!r}")
        file_name, stored = self._where[name]
        return self._file(file_name).read(stored)

    def layer_names(self, split: SplitRange) -> list[str]:
        """Canonical names of every tensor of the trunk's blocks, in a fixed order."""
        prefix = self.family.layer_prefix
        wanted = tuple(f"{prefix}{i}." for i in range(split.start, split.end))
        return [name for name in self.names() if name.startswith(wanted)]

    def add_file(self, key: str, opener: Opener, names: Iterable[str], start: int = 0) -> None:
        """Registers a file whose stored names are known; it is opened when first read.

        Args:
            key: Any unique name of the file.
            opener: Opens it.
            names: Names stored in it.
            start: Added to block indices (for files that count from zero in every part).
        """
        self._openers[key] = opener
        for stored in names:
            canonical = canonical_name(stored, self.family, start)
            if canonical is not None:
                self._where.setdefault(canonical, (key, stored))

    def _file(self, key: str) -> TensorFile:
        if key not in self._files:
            self._files[key] = self._openers[key]()
        return self._files[key]


def canonical_name(stored: str, family: Family, shift: int = 0) -> str | None:
    """Returns the whole model's name of a stored tensor; None for a buffer of older versions."""
    if _OLD_BUFFER.search(stored):
        return None
    name = re.sub(rf"^{re.escape(family.stored_head)}\.", f"{HEAD}.", stored)
    if not name.startswith((f"{family.base}.", f"{HEAD}.")):
        name = f"{family.base}.{name}"
    prefix = re.escape(family.layer_prefix)
    return re.sub(rf"^({prefix})(\d+)\.", lambda m: f"{m[1]}{int(m[2]) + shift}.", name)


def open_checkpoint(model: str | Path) -> Checkpoint:
    """Opens a model folder, a split layout or a hub id.

    Raises:
        CheckpointError: If there is no such model, it is damaged, or its family cannot be split.
    """
    folder = Path(model)
    if os.path.isdir(folder):
        if any(folder.glob("*/*_metadata.json")):
            return _open_split_layout(folder)
        return _open_whole(str(model), _local_file(folder))
    if (
        os.path.lexists(folder)
        or str(model).startswith((".", "/", "~"))
        or str(model).count("/") > 1
    ):
        raise CheckpointError(f"{model}: no such model folder")
    return _open_whole(str(model), partial(_hub_file, str(model)))


def _open_whole(source: str, find: Callable[[str], Path | None]) -> Checkpoint:
    config, metadata = _read_config(source, find)
    checkpoint = Checkpoint(source, config, source)
    checkpoint.metadata |= metadata
    found = next(((n, p) for n in WEIGHT_FILES if (p := find(n)) is not None), None)
    if found is None:
        raise CheckpointError(f"{source}: no weights; accepted: {', '.join(WEIGHT_FILES)}")
    name, path = found
    if name.endswith(".index.json"):
        _add_shards(checkpoint, path, find)
    else:
        file = open_tensor_file(path)
        checkpoint.add_file(name, lambda: file, file.names())
    return checkpoint


def _add_shards(checkpoint: Checkpoint, index: Path, find: Callable[[str], Path | None]) -> None:
    by_shard: dict[str, list[str]] = {}
    for name, shard in _read_json(index).get("weight_map", {}).items():
        if Path(shard).name != shard:
            raise CheckpointError(f"{index}: shard {shard!r} is not a plain file name")
        by_shard.setdefault(shard, []).append(name)

    def opener(shard: str) -> TensorFile:
        return open_tensor_file(find(shard) or index.parent / shard)

    for shard, names in by_shard.items():
        checkpoint.add_file(shard, partial(opener, shard), names)


def _read_config(
    source: str, find: Callable[[str], Path | None]
) -> tuple[PreTrainedConfig, dict[str, dict[str, Any]]]:
    path = find("config.json")
    if path is None:
        raise CheckpointError(f"{source}: no config.json there, so not a model folder")
    raw = _read_json(path)
    ends = raw if raw.get("model_type") == ENDS_TYPE else None
    fields: Any = raw if ends is None else raw.get("config")
    family_of(str(fields.get("model_type") if isinstance(fields, dict) else fields))
    try:
        if ends is not None:
            return AutoConfig.for_model(**fields), {"ends": ends}
        return AutoConfig.from_pretrained(path.parent), {}
    except Exception as error:  # each family's configuration raises what it likes
        raise CheckpointError(f"{path}: not a configuration ({first_line(error)})") from error


def _open_split_layout(folder: Path) -> Checkpoint:
    metadata = {p.parent.name: (p, _read_json(p)) for p in sorted(folder.glob("*/*_metadata.json"))}
    raw = next((m["config"] for _, m in metadata.values() if "config" in m), None)
    if raw is None and not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: no config in any *_metadata.json and no config.json")
    raw = raw if raw is not None else _read_json(folder / "config.json")
    family_of(str(raw.get("model_type")))
    config = AutoConfig.for_model(**raw)
    checkpoint = Checkpoint(str(folder), config, str(folder))
    for role, (path, described) in metadata.items():
        checkpoint.metadata[role] = described
        stem = path.name.removesuffix("_metadata.json")
        _add_part(checkpoint, path.parent / stem, int(described.get("start_layer", 0)))
    return checkpoint


def _add_part(checkpoint: Checkpoint, stem: Path, start: int) -> None:
    paths = [stem.with_name(f"{stem.name}{suffix}") for suffix in (".safetensors", ".pt")]
    path = next((p for p in paths if p.is_file()), None)
    if path is None:
        raise CheckpointError(f"{paths[0]}: no such file (nor .pt), though its metadata is there")
    file = open_tensor_file(path)
    names = file.names()
    checkpoint.add_file(path.name, lambda: file, names, _index_shift(names, checkpoint, start))


def _index_shift(names: list[str], checkpoint: Checkpoint, start: int) -> int:
    """Blocks of a part may be numbered from zero (the guide's files) or globally (ours)."""
    prefix = re.escape(checkpoint.family.layer_prefix)
    canonical = (canonical_name(n, checkpoint.family) or "" for n in names)
    found = [int(m[1]) for n in canonical if (m := re.match(rf"{prefix}(\d+)\.", n))]
    return start if found and min(found) == 0 else 0


def _local_file(folder: Path) -> Callable[[str], Path | None]:
    return lambda name: folder / name if (folder / name).is_file() else None


def _hub_file(repo: str, name: str) -> Path | None:
    try:
        found = cached_file(
            repo,
            name,
            _raise_exceptions_for_missing_entries=False,
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{repo}: neither a folder here nor a model of the hub ({first_line(error)})"
        ) from error
    return Path(found) if found else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path}: holds {type(loaded).__name__}, not an object")
    return loaded
