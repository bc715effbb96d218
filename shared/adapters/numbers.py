"""The numbers of a PEFT configuration, checked before PEFT computes or allocates with them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from peft import PeftConfig

from shared.errors import AdapterError

# Lowest accepted value; every one of these is a whole number.
_COUNTS = {
    "r": 1,
    "init_r": 1,
    "target_r": 1,
    "tinit": 0,
    "tfinal": 0,
    "deltaT": 1,
    "total_step": 1,
    "num_virtual_tokens": 1,
    "encoder_hidden_size": 1,
    "encoder_num_layers": 1,
}
# Bounds of what is a share of something; those of the moving averages exclude both ends.
_SHARES = {"lora_dropout": 1.0, "encoder_dropout": 1.0}
_DECAYS = ("beta1", "beta2")


def check_numbers(config: PeftConfig) -> None:
    """Refuses numbers that no adapter can have.

    Raises:
        AdapterError: Names the field, what was given and what is accepted.
    """
    for name, lowest in _COUNTS.items():
        value = getattr(config, name, None)
        if value is not None and not (_is_count(value) and value >= lowest):
            raise AdapterError(f"{name}={value!r} is not accepted: a whole number from {lowest} is")
    for name, highest in _SHARES.items():
        if not 0 <= _number(name, getattr(config, name, None) or 0.0) < highest:
            raise AdapterError(f"{name} is not accepted: a number from 0 to below {highest} is")
    for name in _DECAYS:
        if not 0 < _number(name, getattr(config, name, 0.5)) < 1:
            raise AdapterError(f"{name} is not accepted: a number between 0 and 1 is")
    alphas = {"lora_alpha": getattr(config, "lora_alpha", 1), **_mapping(config, "alpha_pattern")}
    alphas["orth_reg_weight"] = getattr(config, "orth_reg_weight", 0.0)
    for name, value in alphas.items():
        _number(f"{name}: scale", value)


def largest_rank(config: PeftConfig) -> int:
    """The largest rank a configuration asks for, patterns included; 0 where it has none."""
    patterns = _mapping(config, "rank_pattern")
    if getattr(config, "init_r", None) is not None:
        masks = list(patterns.values())
        if not all(isinstance(m, list) and all(isinstance(b, bool) for b in m) for m in masks):
            raise AdapterError("rank_pattern of AdaLoRA is not accepted: lists of booleans are")
        return max([int(config.init_r), *map(len, masks)])
    ranks = [value for value in [getattr(config, "r", None), *patterns.values()] if value]
    if not all(_is_count(r) and r > 0 for r in [*ranks, *patterns.values()]):
        raise AdapterError(f"ranks {ranks} are not all whole numbers above 0")
    return int(max(ranks, default=0))


def _mapping(config: PeftConfig, name: str) -> Mapping[str, Any]:
    value = getattr(config, name, None) or {}
    if not isinstance(value, Mapping):
        raise AdapterError(f"{name}={value!r} is not accepted: an object is")
    return value


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise AdapterError(f"{name} {value!r} is not accepted: a finite number is")
    return float(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
