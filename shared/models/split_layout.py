"""Writing a checkpoint as three parts: ``bottom/``, ``trunk/`` and ``top/``.

``bottom/gpt2_2-10_bottom.safetensors`` with ``bottom/gpt2_2-10_bottom_metadata.json``, and so on.
Each folder can be handed to its side alone; the configuration travels in the metadata.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from shared import __version__
from shared.models.checkpoint import Checkpoint, open_checkpoint
from shared.models.digest import weight_digest
from shared.models.loading import LM_HEAD
from shared.models.parts import ROLES, build_part
from shared.models.split_range import SplitRange
from shared.new_folder import new_folder


def write_split_layout(model: str | Path, split: SplitRange, out: Path) -> dict[str, Path]:
    """Splits a whole checkpoint into part files, tensors in their stored dtype; all or none.

    Args:
        model: Folder or hub id of a whole checkpoint.
        split: Blocks of the trunk.
        out: New folder.

    Returns:
        The weight file of each role.

    Raises:
        CheckpointError: If the model cannot be read, ``out`` is not new or the disk refuses.
        SplitError: If the split does not fit the model.
    """
    checkpoint = open_checkpoint(model)
    split.check(checkpoint.config.num_hidden_layers)
    with new_folder(out) as folder:
        digest = weight_digest(checkpoint, split)
        files = {
            role: _write_part(folder / role, checkpoint, role, split, digest) for role in ROLES
        }
        _copy_tokenizer(checkpoint, folder)
    return {role: out / role / file for role, file in files.items()}


def part_bounds(role: str, split: SplitRange, num_layers: int) -> tuple[int, int]:
    """First block of a part and the first block above it."""
    return {
        "bottom": (0, split.start),
        "trunk": (split.start, split.end),
        "top": (split.end, num_layers),
    }[role]


def _write_part(
    folder: Path, checkpoint: Checkpoint, role: str, split: SplitRange, digest: str
) -> str:
    """Writes one part to a folder of its own; returns the name of its weight file."""
    stem = f"{checkpoint.family.model_type}_{split.start}-{split.end}_{role}"
    folder.mkdir()
    tensors = _part_tensors(checkpoint, role, split)
    save_file(tensors, folder / f"{stem}.safetensors", metadata={"format": "pt"})
    text = json.dumps(_metadata(checkpoint, role, split, digest), indent=2, sort_keys=True)
    (folder / f"{stem}_metadata.json").write_text(text, encoding="utf-8")
    return f"{stem}.safetensors"


def _part_tensors(checkpoint: Checkpoint, role: str, split: SplitRange) -> dict[str, torch.Tensor]:
    bounds = part_bounds(role, split, checkpoint.config.num_hidden_layers)
    with torch.device("meta"):
        names = build_part(checkpoint.config, role, *bounds).state_dict().keys()
    stored = {
        n: checkpoint.family.embedding_key if n == LM_HEAD and n not in checkpoint else n
        for n in names
    }
    return {name: checkpoint.read(source).clone() for name, source in stored.items()}


def _metadata(checkpoint: Checkpoint, role: str, split: SplitRange, digest: str) -> dict[str, Any]:
    num_layers = checkpoint.config.num_hidden_layers
    start, end = part_bounds(role, split, num_layers)
    return {
        "format": "trunkline-part",
        "version": __version__,
        "role": role,
        "start_layer": start,
        "end_layer": end,
        "num_layers": num_layers,
        "split": str(split),
        "weight_digest": digest,
        "config": checkpoint.config.to_dict(),
    }


def _copy_tokenizer(checkpoint: Checkpoint, out: Path) -> None:
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder)
    except (OSError, ValueError):
        return  # a model folder without a tokenizer is split all the same
    tokenizer.save_pretrained(out)
