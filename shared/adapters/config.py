"""PEFT configurations as they travel: JSON, with only the fields that are known to be harmless.

A configuration comes from a tenant and is given to PEFT on a host that shares its base weights with
other tenants. PEFT has fields that rewrite base weights (PiSSA, OLoRA, LoftQ initialisation), that
import a module by name (``megatron_core``) or that change the model's layers; those never pass.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
from typing import Any

from peft import PeftConfig, PeftType, TaskType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from shared.errors import AdapterError

_COMMON = frozenset({"peft_type", "task_type", "inference_mode", "modules_to_save"})

_LORA = frozenset(
    {
        "r",
        "target_modules",
        "exclude_modules",
        "lora_alpha",
        "lora_dropout",
        "fan_in_fan_out",
        "use_rslora",
        "init_lora_weights",
        "layers_to_transform",
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
        "use_dora",
    }
)

ACCEPTED_FIELDS: dict[str, frozenset[str]] = {"LORA": _COMMON | _LORA}
"""Accepted methods, and of each the fields that may differ from PEFT's default."""

# Where a configuration came from and with which PEFT: says nothing about the adapter itself.
_PROVENANCE = frozenset(
    {"auto_mapping", "base_model_name_or_path", "revision", "peft_version", "runtime_config"}
)

_HARMLESS_INITIALISATIONS = (True, False, "gaussian")
_MAX_JSON_BYTES = 64 * 1024
_MAX_REPEATS = 3


def accepted_methods() -> list[str]:
    """Names of the PEFT methods that can be used, as PEFT writes them."""
    return sorted(ACCEPTED_FIELDS)


def check_config(config: PeftConfig) -> None:
    """Refuses a configuration that could not be used on a split model.

    Raises:
        AdapterError: Names the method or field, what was given and what is accepted.
    """
    method = _method_name(config.peft_type)
    for name, value in _changed_fields(config).items():
        if name not in ACCEPTED_FIELDS[method]:
            raise AdapterError(
                f"{method} with {name}={value!r} is not accepted on a split model; fields that may "
                f"be set: {', '.join(sorted(ACCEPTED_FIELDS[method]))}"
            )
    initialisation = getattr(config, "init_lora_weights", True)
    if initialisation not in _HARMLESS_INITIALISATIONS:
        raise AdapterError(
            f"init_lora_weights={initialisation!r} would rewrite base weights; accepted: "
            f"{', '.join(map(repr, _HARMLESS_INITIALISATIONS))}"
        )
    _check_patterns(config)
    _check_numbers(config)
    if config.task_type not in (None, TaskType.CAUSAL_LM):
        raise AdapterError(f"task_type {config.task_type} is not accepted; accepted: CAUSAL_LM")


def config_to_json(config: PeftConfig) -> str:
    """Writes the fields that differ from PEFT's defaults.

    Raises:
        AdapterError: If :func:`check_config` refuses it.
    """
    check_config(config)
    fields = {k: v for k, v in _changed_fields(config).items() if k not in _COMMON}
    fields["peft_type"] = _method_name(config.peft_type)
    if config.modules_to_save:
        fields["modules_to_save"] = config.modules_to_save
    return json.dumps(fields, sort_keys=True, default=_plain)


def config_from_json(text: str) -> PeftConfig:
    """Reads what :func:`config_to_json` or PEFT's ``adapter_config.json`` wrote.

    Raises:
        AdapterError: If it is no such JSON, or is refused by :func:`check_config`.
    """
    if len(text) > _MAX_JSON_BYTES:
        raise AdapterError(f"PEFT configuration of {len(text)} bytes; at most {_MAX_JSON_BYTES}")
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
        AdapterError: If the method or a field is unknown or refused.
    """
    method = _method_name(fields.get("peft_type"))
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method)]
    given = {k: v for k, v in fields.items() if k not in _PROVENANCE | {"peft_type"}}
    known = {field.name for field in dataclasses.fields(config_class)}
    if unknown := sorted(set(given) - known):
        raise AdapterError(f"{method} has no field {', '.join(unknown)}")
    given.update(task_type=TaskType.CAUSAL_LM, inference_mode=False)
    try:
        config = config_class(**given)
    except (TypeError, ValueError, AttributeError, ImportError) as error:
        raise AdapterError(f"{method} configuration refused by PEFT: {error}") from error
    check_config(config)
    return config


def largest_rank(config: PeftConfig) -> int:
    """The largest rank a LoRA configuration asks for, patterns included."""
    patterns = getattr(config, "rank_pattern", None) or {}
    if not isinstance(patterns, dict):
        raise AdapterError(f"rank_pattern={patterns!r} is not accepted: an object is")
    ranks = [getattr(config, "r", 0) or 0, *patterns.values()]
    if not all(isinstance(r, int) and r > 0 for r in ranks):
        raise AdapterError(f"ranks {ranks} are not all whole numbers above 0")
    return int(max(ranks))


def _check_patterns(config: PeftConfig) -> None:
    """Refuses regular expressions that could take for ever to match a module's name."""
    for name in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
        value = getattr(config, name, None) or ()
        if not isinstance(value, str | list | tuple | set):
            raise AdapterError(f"{name}={value!r} is not accepted: a string or a list of them is")
        for pattern in (value,) if isinstance(value, str) else value:
            _check_pattern(name, pattern)
    for name in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, name, None) or {}:
            _check_pattern(name, pattern)


def _check_pattern(name: str, pattern: Any) -> None:
    # A repeated group can match in exponentially many ways; a few plain repeats cannot.
    repeats = re.findall(r"[*+{]", pattern) if isinstance(pattern, str) else [""] * 99
    if len(repeats) > _MAX_REPEATS or re.search(r"\)[*+{]", pattern):
        raise AdapterError(
            f"{name} {pattern!r} is not accepted: a string with at most {_MAX_REPEATS} "
            f"repetitions and none of a group is"
        )
    try:
        re.compile(pattern)
    except re.error as error:
        raise AdapterError(f"{name} {pattern!r} is not a regular expression: {error}") from error


def _check_numbers(config: PeftConfig) -> None:
    patterns = getattr(config, "alpha_pattern", None) or {}
    if not isinstance(patterns, dict):
        raise AdapterError(f"alpha_pattern={patterns!r} is not accepted: an object is")
    alphas = {"lora_alpha": getattr(config, "lora_alpha", 1), **patterns}
    for name, value in alphas.items():
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise AdapterError(f"{name}: scale {value!r} is not accepted: a finite number is")


def _method_name(peft_type: Any) -> str:
    name = str(getattr(peft_type, "value", peft_type)).upper()
    if name not in ACCEPTED_FIELDS:
        accepted = ", ".join(accepted_methods())
        raise AdapterError(f"PEFT method {name} is not accepted; accepted: {accepted}")
    return name


def _changed_fields(config: PeftConfig) -> dict[str, Any]:
    default = type(config)().to_dict()
    return {
        name: copy.deepcopy(value)
        for name, value in config.to_dict().items()
        if name not in _PROVENANCE
        and value != default.get(name)
        and name != "inference_mode"
        and name != "task_type"
    }


def _plain(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return sorted(value)
    raise AdapterError(f"{value!r} in a PEFT configuration does not travel as JSON")
