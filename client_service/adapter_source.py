"""Finding the adapter in what training left behind."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig

from client_service.adapter_files import CONFIG_FILE, Weights, read_adapter
from client_service.placement import leave_out
from shared.errors import AdapterError

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
    base = model or str(config.base_model_name_or_path or "")
    if model:
        config.revision = None
    return FoundAdapter(kind, folder, config, weights, base)


def _parts(folder: Path, model: str) -> FoundAdapter:
    """Joins the adapters of three parts, whose weights have the whole model's names.

    Raises:
        AdapterError: If they are not parts of one adapter.
    """
    sides = {
        part: read_adapter(folder / f"{part}_lora")
        for part in _PARTS
        if part != "trunk" or (folder / "trunk_lora").is_dir()
    }
    configs = [config for config, _ in sides.values()]
    kinds = list(dict.fromkeys(config.peft_type.value for config in configs))
    if len(kinds) > 1:
        raise AdapterError(f"{folder}: {' and '.join(kinds)} are not one adapter")
    if configs[0].is_prompt_learning:
        raise AdapterError(
            f"{folder}: {kinds[0]} is one tensor for the whole model, so parts of it cannot be "
            f"joined"
        )
    _check_order(folder, {part: weights for part, (_, weights) in sides.items()})
    config = copy.deepcopy(configs[0])
    config.target_modules = _targets(folder, configs)
    saved = {name for c in configs for name in getattr(c, "modules_to_save", None) or ()}
    config.modules_to_save = sorted(saved) or None
    weights = {name: tensor for _, side in sides.values() for name, tensor in side.items()}
    base = model or next((str(b) for c in configs if (b := c.base_model_name_or_path)), "")
    config.base_model_name_or_path = base or None
    if "trunk" not in sides:
        _leave_out_trunk(config, [weights for _, weights in sides.values()])
    return FoundAdapter("parts", folder, config, weights, base, joined=True)


def _leave_out_trunk(config: PeftConfig, ends: list[Weights]) -> None:
    """Says that the blocks between those of the ends have no adapter."""
    bottom, top = map(_blocks, ends)
    if bottom and top and (between := range(max(bottom) + 1, min(top))):
        leave_out(config, rf".*\.(?:{'|'.join(map(str, between))})\..*")


def _targets(folder: Path, configs: list[PeftConfig]) -> Any:
    named = [config.target_modules for config in configs]
    patterns = {names for names in named if isinstance(names, str)}
    if patterns and (len(patterns) > 1 or not all(isinstance(names, str) for names in named)):
        raise AdapterError(f"{folder}: its parts have other patterns of target_modules each")
    return patterns.pop() if patterns else sorted({n for names in named for n in names or ()})


def _check_order(folder: Path, sides: dict[str, Weights]) -> None:
    """Refuses parts whose blocks overlap: they would be numbered within the part."""
    blocks = {part: _blocks(weights) for part, weights in sides.items()}
    ordered = [(part, found) for part in _PARTS if (found := blocks.get(part))]
    for (below, lower), (above, upper) in pairwise(ordered):
        if max(lower) >= min(upper):
            raise AdapterError(
                f"{folder}: {below}_lora/ has block {max(lower)} and {above}_lora/ block "
                f"{min(upper)}: blocks must be numbered as in the whole model, in order"
            )


def _blocks(names: Iterable[str]) -> set[int]:
    return {int(m[1]) for name in names if (m := re.search(r"\.(\d+)\.", name))}
