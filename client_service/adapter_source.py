"""Finding the adapter in what training left behind."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig

from shared.adapters.joining import Side, SplitShape, join_adapter
from shared.adapters.methods import DERIVED_FIELDS, method_of
from shared.adapters.prefix import KEY
from shared.adapters.weights import (
    CONFIG_FILE,
    Provenance,
    Weights,
    read_adapter,
    read_provenance,
)
from shared.errors import AdapterError
from shared.models import SplitRange, open_checkpoint

ACCEPTED = (
    "an adapter folder, a Trainer's checkpoint-N or output folder, a `trunkline train --out` "
    "folder, or what PEFTSplitLearningTrainer.save_lora_weights wrote"
)

_PARTS = ("bottom", "trunk", "top")


@dataclass(frozen=True)
class FoundAdapter:
    """An adapter of the whole model, read."""

    kind: str
    folder: Path
    """Where it lies; of three parts, the folder that holds them."""
    config: PeftConfig
    weights: Weights
    base: str
    """Folder or hub id of the base model; empty if nothing says so."""
    noted: Provenance
    joined: bool = False
    """Whether it was made out of three parts' adapters."""


def find_adapter(checkpoint: Path, model: str = "") -> FoundAdapter:
    """Reads the adapter of a checkpoint, whichever kind of folder that is.

    Args:
        checkpoint: A folder of one of the kinds in ``ACCEPTED``.
        model: The base model, if the adapter does not say it or says another.

    Returns:
        The adapter, its blocks under the whole model's indices.

    Raises:
        AdapterError: If there is none, it is damaged, or its parts are not of one model.
    """
    found = _find(checkpoint, model)
    for name, weight in found.weights.items():
        if not bool(torch.isfinite(weight).all()):
            raise AdapterError(f"{found.folder}: {name} holds NaN or Inf")
    return found


def _find(checkpoint: Path, model: str) -> FoundAdapter:
    if not os.path.isdir(checkpoint):
        raise AdapterError(f"{checkpoint}: no such folder; accepted: {ACCEPTED}")
    if (checkpoint / CONFIG_FILE).is_file():
        of_trainer = (checkpoint / "trainer_state.json").is_file()
        return _one(checkpoint, "trainer checkpoint" if of_trainer else "adapter", model)
    if (checkpoint / "adapter" / CONFIG_FILE).is_file():
        return _one(checkpoint / "adapter", "training run", model)
    if any((checkpoint / f"{part}_lora").is_dir() for part in _PARTS):
        return _parts(checkpoint, model)
    if newest := _newest(checkpoint):
        return _one(newest, "trainer output", model)
    raise AdapterError(f"{checkpoint}: no {CONFIG_FILE} in it; accepted: {ACCEPTED}")


def _newest(output: Path) -> Path | None:
    """The checkpoint of the largest step that holds an adapter."""
    steps = {
        int(m[1]): path
        for path in output.iterdir()
        if (m := re.fullmatch(r"checkpoint-(\d+)", path.name)) and (path / CONFIG_FILE).is_file()
    }
    return steps[max(steps)] if steps else None


def _one(folder: Path, kind: str, model: str) -> FoundAdapter:
    config, weights = read_adapter(folder)
    fields = _fields(folder)
    # Reading leaves out what must not come from a tenant; here it is the owner's own file.
    for name in DERIVED_FIELDS & fields.keys():
        setattr(config, name, fields[name])
    base = model or str(fields.get("base_model_name_or_path") or "")
    if not model:
        config.revision = fields.get("revision")
    return FoundAdapter(kind, folder, config, weights, base, read_provenance(folder))


def _parts(folder: Path, model: str) -> FoundAdapter:
    sides = {
        part: Side(*read_adapter(folder / f"{part}_lora"))
        for part in _PARTS
        if part != "trunk" or (folder / "trunk_lora").is_dir()
    }
    bases = (_fields(folder / f"{part}_lora").get("base_model_name_or_path") for part in sides)
    base = model or next((str(b) for b in bases if b), "")
    method = method_of(sides["bottom"].config.peft_type).name
    if others := {method_of(s.config.peft_type).name for s in sides.values()} - {method}:
        raise AdapterError(f"{folder}: {method} and {', '.join(others)} are not one adapter")
    if method in ("PROMPT_TUNING", "P_TUNING"):
        raise AdapterError(
            f"{folder}: {method} works on the bottom alone, so parts of it cannot be joined"
        )
    join = _join_prefixes if method == "PREFIX_TUNING" else _join_blocks
    side = join(folder, sides, base)
    return FoundAdapter("parts", folder, side.config, side.weights, base, Provenance(), True)


def _join_blocks(folder: Path, sides: dict[str, Side], base: str) -> Side:
    """Joins methods that keep their weights by block; ``base`` is not needed."""
    _check_order(folder, sides)
    shape: Any = None  # of these methods nothing but names is looked at
    ends = join_adapter(sides["bottom"], sides["top"], shape)
    return join_adapter(ends, sides.get("trunk"), shape)


def _join_prefixes(folder: Path, sides: dict[str, Side], base: str) -> Side:
    """Joins prefixes, whose columns say how many blocks a part has once the whole is known."""
    if "trunk" not in sides or not base:
        what = "no trunk_lora/ in it" if "trunk" not in sides else "name the model with --model"
        raise AdapterError(f"{folder}: a prefix covers every block of the model; {what}")
    checkpoint = open_checkpoint(base)
    count = checkpoint.config.num_hidden_layers
    columns = {part: side.weights[KEY].shape[1] for part, side in sides.items()}
    width = sum(columns.values()) // count
    blocks = {part: c // width for part, c in columns.items()}
    if any(blocks[part] * width != c for part, c in columns.items()):
        raise AdapterError(f"{folder}: prefixes of {columns} columns are not of {count} blocks")
    split = SplitRange(blocks["bottom"], blocks["bottom"] + blocks["trunk"])
    bottom, top = sides["bottom"].weights[KEY], sides["top"].weights[KEY]
    hole = torch.zeros_like(bottom[:, :width])
    client = Side(sides["bottom"].config, {KEY: torch.cat([bottom, hole, top], dim=1)})
    return join_adapter(client, sides["trunk"], SplitShape(checkpoint.family, split, count))


def _check_order(folder: Path, sides: dict[str, Side]) -> None:
    """Refuses parts whose blocks overlap: they would be numbered within the part."""
    blocks = {part: _blocks(side.weights) for part, side in sides.items()}
    ordered = [(part, found) for part in _PARTS if (found := blocks.get(part))]
    for (below, lower), (above, upper) in pairwise(ordered):
        if max(lower) >= min(upper):
            raise AdapterError(
                f"{folder}: {below}_lora/ has block {max(lower)} and {above}_lora/ block "
                f"{min(upper)}: blocks must be numbered as in the whole model, in order"
            )


def _blocks(names: Iterable[str]) -> set[int]:
    return {int(m[1]) for name in names if (m := re.search(r"\.(\d+)\.", name))}


def _fields(folder: Path) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    return fields
