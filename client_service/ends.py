"""The ends of a split model that are trained themselves, without a PEFT adapter."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from client_service.placement import PARTS, part_of
from shared.errors import AdapterError
from shared.models.checkpoint import ENDS_TYPE
from shared.models.families import family_of


def train_ends(model: Any, parts: str) -> None:
    """Freezes the end that is not named.

    Raises:
        AdapterError: If only the trunk is named, whose weights are everyone's.
    """
    if parts == "trunk":
        raise AdapterError(
            "the trunk's own weights are shared by all tenants and never trained: give it an "
            "adapter (peft_config with peft_parts='trunk')"
        )
    family = family_of(model.config.model_type)
    for name, parameter in model.named_parameters():
        part = part_of(name, family, model.split)
        if part != "trunk":
            parameter.requires_grad_(part in PARTS[parts])


def mark_as_ends(folder: str | os.PathLike[str], split: str, weight_digest: str) -> None:
    """Makes a saved folder one that only a split model is loaded from.

    Its ``config.json`` names a model type of its own: elsewhere, transformers would fill the
    trunk's blocks with random numbers after a warning.

    Args:
        folder: What transformers wrote of the ends.
        split: Of the model.
        weight_digest: Of the trunk that they belong to.
    """
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    marked = {
        "model_type": ENDS_TYPE,
        "split": split,
        "weight_digest": weight_digest,
        "config": config,
    }
    path.write_text(json.dumps(marked, indent=2) + "\n", encoding="utf-8")
