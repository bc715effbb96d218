"""Adapter weights by name: reading, writing, cutting onto the parts and joining again.

Blocks keep their global names in every part, so the adapter of the whole model is the union of the
parts' adapters, and cutting one is choosing by name.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from shared.adapters.config import config_from_fields
from shared.errors import AdapterError
from shared.models.families import Family
from shared.models.split_range import SplitRange

Weights = dict[str, torch.Tensor]

CONFIG_FILE = "adapter_config.json"
WEIGHT_FILE = "adapter_model.safetensors"


def adapter_weights(model: Any) -> Weights:
    """Copies the adapter's weights out of a ``PeftModel``, under the names PEFT saves them by."""
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}


def load_adapter_weights(model: Any, weights: Weights) -> None:
    """Gives a ``PeftModel`` the weights of an adapter of the same shape.

    Raises:
        AdapterError: If a name is missing or too many, or a shape or value does not fit; the
            model is then unchanged.
    """
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    missing, foreign = expected.keys() - weights.keys(), weights.keys() - expected.keys()
    if missing or foreign:
        raise AdapterError(
            f"adapter weights do not fit: {len(missing)} missing{_example(missing)}, "
            f"{len(foreign)} not of this adapter{_example(foreign)}"
        )
    for name, tensor in weights.items():
        _check_weight(name, tensor, expected[name])
    set_peft_model_state_dict(model, weights)


def is_trunk_weight(name: str, family: Family, split: SplitRange) -> bool:
    """Tells whether an adapter weight belongs to a block of the trunk."""
    match = re.search(rf"(?:^|\.){re.escape(family.layer_prefix)}(\d+)\.", name)
    return match is not None and split.start <= int(match[1]) < split.end


def cut(weights: Weights, family: Family, split: SplitRange) -> tuple[Weights, Weights]:
    """Divides a whole model's adapter into the client's weights and the trunk's."""
    client: Weights = {}
    trunk: Weights = {}
    for name, tensor in weights.items():
        (trunk if is_trunk_weight(name, family, split) else client)[name] = tensor
    return client, trunk


def read_adapter(folder: str | Path) -> tuple[PeftConfig, Weights]:
    """Reads a PEFT adapter folder; only safetensors, never a pickled file.

    Raises:
        AdapterError: If a file is missing or damaged, or its configuration is refused.
    """
    folder = Path(folder)
    config_path, weight_path = folder / CONFIG_FILE, folder / WEIGHT_FILE
    for path in (config_path, weight_path):
        if not path.is_file():
            raise AdapterError(f"{path}: no such file; an adapter folder has it")
    try:
        fields = json.loads(config_path.read_text(encoding="utf-8"))
        weights = load_file(weight_path)
    except Exception as error:
        raise AdapterError(f"{folder}: not a readable adapter ({error})") from error
    if not isinstance(fields, dict):
        raise AdapterError(f"{config_path}: holds {type(fields).__name__}, not an object")
    return config_from_fields(fields), weights


def write_adapter(folder: str | Path, config: PeftConfig, weights: Weights, base: str) -> None:
    """Writes a standard PEFT adapter of the whole model.

    Args:
        folder: Created if needed.
        config: The adapter's configuration.
        weights: By the names PEFT saves them by.
        base: The whole model's folder or hub id, which PEFT records.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {name: weights[name].contiguous() for name in sorted(weights)}
    save_file(contiguous, folder / WEIGHT_FILE, metadata={"format": "pt"})
    recorded = config.inference_mode, config.base_model_name_or_path
    config.inference_mode, config.base_model_name_or_path = True, base
    try:
        config.save_pretrained(str(folder))
    finally:
        config.inference_mode, config.base_model_name_or_path = recorded


def _check_weight(name: str, given: torch.Tensor, expected: torch.Tensor) -> None:
    if given.shape != expected.shape or not given.is_floating_point():
        raise AdapterError(
            f"adapter weight {name} is {given.dtype} {tuple(given.shape)}; "
            f"accepted: floating point {tuple(expected.shape)}"
        )
    if not bool(torch.isfinite(given).all()):
        raise AdapterError(f"adapter weight {name} holds NaN or Inf")


def _example(names: set[str]) -> str:
    return f" (such as {min(names)})" if names else ""
