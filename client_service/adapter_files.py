"""Adapters by name: out of a model, into a model, from and to the folders that PEFT writes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from peft import (
    PeftConfig,
    PeftType,
    TaskType,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file, save_file

from shared.errors import AdapterError
from shared.models.tensor_files import first_line

Weights = dict[str, torch.Tensor]

CONFIG_FILE = "adapter_config.json"
WEIGHT_FILE = "adapter_model.safetensors"


def config_from_json(text: str) -> PeftConfig:
    """Reads a configuration as PEFT's ``adapter_config.json`` has it.

    Raises:
        AdapterError: If it is no such JSON, or PEFT refuses it.
    """
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"PEFT configuration is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise AdapterError(f"PEFT configuration is {type(fields).__name__}, not an object")
    return config_from_fields(fields)


def config_from_fields(fields: dict[str, Any]) -> PeftConfig:
    """Builds a configuration from its fields, ``peft_type`` among them.

    Raises:
        AdapterError: If the method or a field is unknown, or PEFT refuses it.
    """
    said = str(fields.get("peft_type")).upper()
    kinds = {kind.value: made for kind, made in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if said not in kinds:
        raise AdapterError(f"PEFT method {said} is not known; accepted: {', '.join(sorted(kinds))}")
    given = {
        name: value for name, value in fields.items() if name not in ("peft_type", "auto_mapping")
    }
    known = {field.name for field in dataclasses.fields(kinds[said])}
    if unknown := sorted(given.keys() - known):
        raise AdapterError(f"{said} has no field {', '.join(unknown)}")
    given["inference_mode"] = False
    if given.get("task_type") is None:
        given["task_type"] = TaskType.CAUSAL_LM
    try:
        config: PeftConfig = kinds[said](**given)
    except (TypeError, ValueError, AttributeError, ImportError) as error:
        raise AdapterError(f"{said} configuration refused by PEFT: {error}") from error
    return config


def adapter_weights(model: Any, name: str = "default") -> Weights:
    """Copies an adapter's weights out of a ``PeftModel``, under the names PEFT saves them by."""
    state: Weights = get_peft_model_state_dict(
        model, adapter_name=name, save_embedding_layers=False
    )
    return {key: tensor.detach().cpu().clone() for key, tensor in state.items()}


def load_adapter_weights(model: Any, weights: Weights, name: str = "default") -> None:
    """Gives an adapter of a ``PeftModel`` the weights of one of the same shape.

    Raises:
        AdapterError: If a name is missing or too many, or a shape does not fit, or the adapter is
            one that PEFT saves the result of alone; the model is then unchanged.
    """
    config = model.peft_config[name]
    if getattr(config, "prefix_projection", False) or config.peft_type == PeftType.P_TUNING:
        raise AdapterError(
            f"{config.peft_type.value}: PEFT saves what the encoder of virtual tokens gives, not "
            f"the encoder, so it does not go back into one"
        )
    expected = adapter_weights(model, name)
    missing, foreign = expected.keys() - weights.keys(), weights.keys() - expected.keys()
    if missing or foreign:
        raise AdapterError(
            f"adapter weights do not fit: {len(missing)} missing{_example(missing)}, "
            f"{len(foreign)} not of this adapter{_example(foreign)}"
        )
    for key, tensor in weights.items():
        if tensor.shape != expected[key].shape or not tensor.is_floating_point():
            raise AdapterError(
                f"adapter weight {key} is {tensor.dtype} {tuple(tensor.shape)}; accepted: floating "
                f"point {tuple(expected[key].shape)}"
            )
    set_peft_model_state_dict(model, dict(weights), adapter_name=name)


def read_adapter(folder: str | Path) -> tuple[PeftConfig, Weights]:
    """Reads a PEFT adapter folder; only safetensors, never a pickled file.

    Raises:
        AdapterError: If a file is missing or damaged, or its configuration is refused.
    """
    folder = Path(folder)
    config_path, weight_path = folder / CONFIG_FILE, folder / WEIGHT_FILE
    if not weight_path.is_file() and (pickled := sorted(folder.glob("adapter_model.*"))):
        raise AdapterError(f"{pickled[0]}: accepted is {WEIGHT_FILE}; nothing is unpickled here")
    for path in (config_path, weight_path):
        if not path.is_file():
            raise AdapterError(f"{path}: no such file; an adapter folder has it")
    try:
        text, weights = config_path.read_text(encoding="utf-8"), load_file(weight_path)
    except Exception as error:  # safetensors raises whatever it meets
        raise AdapterError(f"{folder}: not a readable adapter ({first_line(error)})") from error
    try:
        return config_from_json(text), weights
    except AdapterError as error:
        raise AdapterError(f"{config_path}: {error}") from error


def write_adapter(folder: str | Path, config: PeftConfig, weights: Weights, base: str) -> None:
    """Writes a standard PEFT adapter.

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


def _example(names: set[str]) -> str:
    return f" (such as {min(names)})" if names else ""
