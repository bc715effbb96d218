"""PEFT configurations as they travel: JSON, with only the fields that are known to be harmless.

A configuration comes from a tenant and is given to PEFT on a host that shares its base weights with
other tenants; :mod:`shared.adapters.methods` says what may be set.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from typing import Any

from peft import PeftConfig, PeftType, TaskType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from shared.adapters.methods import DERIVED_FIELDS, method_of
from shared.adapters.numbers import check_numbers
from shared.errors import AdapterError

# Where a configuration came from and with which PEFT: says nothing about the adapter itself.
_PROVENANCE = frozenset(
    {"auto_mapping", "base_model_name_or_path", "revision", "peft_version", "runtime_config"}
)

_HARMLESS_INITIALISATIONS = (True, False, "gaussian")
_PATTERN_FIELDS = (
    "target_modules",
    "exclude_modules",
    "feedforward_modules",
    "layers_pattern",
    "modules_to_save",
)
_MAX_JSON_BYTES = 256 * 1024
_MAX_REPEATS = 3


def check_config(config: PeftConfig) -> None:
    """Refuses a configuration that could not be used on a split model.

    Raises:
        AdapterError: Names the method or field, what was given and what is accepted.
    """
    method = method_of(config.peft_type)
    for name, value in _changed_fields(config).items():
        if name not in method.fields:
            raise AdapterError(
                f"{method.name} with {name}={value!r} is not accepted on a split model; fields "
                f"that may be set: {', '.join(sorted(method.fields))}"
            )
    initialisation = getattr(config, "init_lora_weights", True)
    if initialisation not in _HARMLESS_INITIALISATIONS:
        raise AdapterError(
            f"init_lora_weights={initialisation!r} would rewrite base weights; accepted: "
            f"{', '.join(map(repr, _HARMLESS_INITIALISATIONS))}"
        )
    _check_patterns(config)
    check_numbers(config)
    if config.task_type not in (None, TaskType.CAUSAL_LM):
        raise AdapterError(f"task_type {config.task_type} is not accepted; accepted: CAUSAL_LM")


def config_to_json(config: PeftConfig) -> str:
    """Writes the fields that differ from PEFT's defaults.

    Raises:
        AdapterError: If :func:`check_config` refuses it.
    """
    check_config(config)
    fields = {k: v for k, v in _changed_fields(config).items() if k != "peft_type"}
    fields["peft_type"] = method_of(config.peft_type).name
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
    method = method_of(fields.get("peft_type")).name
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method)]
    left_out = _PROVENANCE | DERIVED_FIELDS | {"peft_type"}
    given = {k: v for k, v in fields.items() if k not in left_out}
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


def _check_patterns(config: PeftConfig) -> None:
    """Refuses regular expressions that could take for ever to match a module's name."""
    for name in _PATTERN_FIELDS:
        value = getattr(config, name, None) or ()
        if not isinstance(value, str | list | tuple | set):
            raise AdapterError(f"{name}={value!r} is not accepted: a string or a list of them is")
        for pattern in (value,) if isinstance(value, str) else value:
            _check_pattern(name, pattern)
    for name in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, name, None) or {}:
            _check_pattern(name, pattern)  # AdaLoRA's are plain names, which pass


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


def _changed_fields(config: PeftConfig) -> dict[str, Any]:
    ignored = _PROVENANCE | DERIVED_FIELDS | {"inference_mode", "task_type"}
    return {
        field.name: copy.deepcopy(value)
        for field in dataclasses.fields(config)
        if field.name not in ignored and (value := getattr(config, field.name)) != _default(field)
    }


def _default(field: dataclasses.Field[Any]) -> Any:
    # Not those of a configuration made without arguments: AdaLoRA's cannot be.
    factory = field.default_factory
    return field.default if factory is dataclasses.MISSING else factory()


def _plain(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return sorted(value)
    raise AdapterError(f"{value!r} in a PEFT configuration does not travel as JSON")
