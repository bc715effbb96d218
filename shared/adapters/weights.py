"""Adapter weights by name: out of a model, into a model, from and to files."""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftType, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.warning import PeftWarning
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from shared.adapters.config import config_from_fields
from shared.errors import AdapterError
from shared.models.families import Family
from shared.models.split_range import SplitRange

Weights = dict[str, torch.Tensor]

CONFIG_FILE = "adapter_config.json"
WEIGHT_FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class Provenance:
    """Where an adapter was trained."""

    split: str = ""
    weight_digest: str = ""
    """Of the trunk's weights; means something for the same split alone."""
    committed_step: int = 0
    """The trunk's optimizer steps so far."""

    def noted(self) -> dict[str, str]:
        """As metadata of a safetensors file."""
        return {
            "trunkline.split": self.split,
            "trunkline.weight_digest": self.weight_digest,
            "trunkline.committed_step": str(self.committed_step),
        }


def adapter_weights(model: Any, name: str = "default") -> Weights:
    """Copies an adapter's weights out of a ``PeftModel``, under the names PEFT saves them by."""
    state = _saved_state(model, name)
    return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}


def load_adapter_weights(model: Any, weights: Weights, name: str = "default") -> None:
    """Gives an adapter of a ``PeftModel`` the weights of one of the same shape.

    Raises:
        AdapterError: If a name is missing or too many, a shape or value does not fit, or the
            adapter is one that PEFT saves the result of alone; the model is then unchanged.
    """
    _check_loadable(model.peft_config[name])
    expected = _saved_state(model, name)
    missing, foreign = expected.keys() - weights.keys(), weights.keys() - expected.keys()
    if missing or foreign:
        raise AdapterError(
            f"adapter weights do not fit: {len(missing)} missing{_example(missing)}, "
            f"{len(foreign)} not of this adapter{_example(foreign)}"
        )
    for key, tensor in weights.items():
        _check_weight(key, tensor, expected[key])
    if weights:
        set_peft_model_state_dict(model, weights, adapter_name=name)


def _saved_state(model: Any, name: str) -> Weights:
    """What PEFT would save, names to tensors of the model itself."""
    config = model.peft_config[name]
    if getattr(config, "target_modules", None) == DUMMY_TARGET_MODULES and not (
        config.modules_to_save
    ):
        return {}  # it only stands for an adapter of the other side
    with warnings.catch_warnings():
        # A matrix of which AdaLoRA keeps nothing is empty by right.
        warnings.filterwarnings("ignore", r".*LoRA tensor\(s\) have invalid shape", PeftWarning)
        state: Weights = get_peft_model_state_dict(
            model, adapter_name=name, save_embedding_layers=False
        )
    return state


def _check_loadable(config: PeftConfig) -> None:
    projected = getattr(config, "prefix_projection", False)
    if projected or config.peft_type == PeftType.P_TUNING:
        what = "prefix_projection" if projected else "p-tuning"
        raise AdapterError(
            f"{what}: PEFT saves what the encoder of virtual tokens gives, not the encoder, so it "
            f"does not go back into one; open a new model with adapter=FOLDER to go on from it"
        )


def is_trunk_weight(name: str, family: Family, split: SplitRange) -> bool:
    """Tells whether an adapter weight belongs to a block of the trunk."""
    match = re.search(rf"(?:^|\.){re.escape(family.layer_prefix)}(\d+)\.", name)
    return match is not None and split.start <= int(match[1]) < split.end


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
        fields = json.loads(config_path.read_text(encoding="utf-8"))
        weights = load_file(weight_path)
    except Exception as error:
        raise AdapterError(f"{folder}: not a readable adapter ({error})") from error
    if not isinstance(fields, dict):
        raise AdapterError(f"{config_path}: holds {type(fields).__name__}, not an object")
    return config_from_fields(fields), weights


def read_provenance(folder: str | Path) -> Provenance:
    """What :func:`write_adapter` noted in a folder; empty for an adapter of other origin."""
    try:
        with safe_open(Path(folder) / WEIGHT_FILE, framework="pt") as file:
            noted = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{folder}: not a readable adapter ({error})") from error
    step = noted.get("trunkline.committed_step", "")
    return Provenance(
        split=noted.get("trunkline.split", ""),
        weight_digest=noted.get("trunkline.weight_digest", ""),
        committed_step=int(step) if step.isdigit() else 0,
    )


def write_adapter(
    folder: str | Path,
    config: PeftConfig,
    weights: Weights,
    base: str,
    provenance: Provenance | None = None,
) -> None:
    """Writes a standard PEFT adapter of the whole model.

    Args:
        folder: Created if needed.
        config: The adapter's configuration.
        weights: By the names PEFT saves them by.
        base: The whole model's folder or hub id, which PEFT records.
        provenance: Noted in the weight file's metadata, which PEFT does not look at.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {name: weights[name].contiguous() for name in sorted(weights)}
    noted = {} if provenance is None else provenance.noted()
    save_file(contiguous, folder / WEIGHT_FILE, metadata={"format": "pt", **noted})
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
