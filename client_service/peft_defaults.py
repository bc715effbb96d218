"""A sensible configuration of each PEFT method by name, for who does not bring one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
)

from shared.errors import AdapterError
from shared.models import Family

_TASK: dict[str, Any] = {"task_type": "CAUSAL_LM"}
_VIRTUAL_TOKENS = 16


def _lora(family: Family, dropout: float, steps: int, **more: Any) -> PeftConfig:
    targets = list(family.linear_layers)
    return LoraConfig(
        **_TASK,
        r=8,
        lora_alpha=16,
        lora_dropout=dropout,
        target_modules=targets,
        fan_in_fan_out=family.model_type == "gpt2",  # whose layers are Conv1D
        **more,
    )


def _dora(family: Family, dropout: float, steps: int) -> PeftConfig:
    return _lora(family, dropout, steps, use_dora=True)


def _rslora(family: Family, dropout: float, steps: int) -> PeftConfig:
    return _lora(family, dropout, steps, use_rslora=True)


def _adalora(family: Family, dropout: float, steps: int) -> PeftConfig:
    """Ranks from 12 to 8 on average, between a tenth and four fifths of the steps."""
    if steps < 10:
        raise AdapterError(f"adalora over {steps} steps: accepted are 10 or more, for its schedule")
    return AdaLoraConfig(
        **_TASK,
        init_r=12,
        target_r=8,
        lora_alpha=16,
        lora_dropout=dropout,
        total_step=steps,
        tinit=steps // 10,
        tfinal=steps // 5,
        deltaT=max(1, steps // 50),
        target_modules=list(family.linear_layers),
        fan_in_fan_out=family.model_type == "gpt2",
    )


def _ia3(family: Family, dropout: float, steps: int) -> PeftConfig:
    return IA3Config(**_TASK)


def _prefix(family: Family, dropout: float, steps: int) -> PeftConfig:
    return PrefixTuningConfig(**_TASK, num_virtual_tokens=_VIRTUAL_TOKENS)


def _prompt(family: Family, dropout: float, steps: int) -> PeftConfig:
    return PromptTuningConfig(**_TASK, num_virtual_tokens=_VIRTUAL_TOKENS)


def _p_tuning(family: Family, dropout: float, steps: int) -> PeftConfig:
    return PromptEncoderConfig(**_TASK, num_virtual_tokens=_VIRTUAL_TOKENS, encoder_hidden_size=128)


DEFAULTS: dict[str, Callable[[Family, float, int], PeftConfig]] = {
    "lora": _lora,
    "dora": _dora,
    "rslora": _rslora,
    "adalora": _adalora,
    "ia3": _ia3,
    "prefix": _prefix,
    "prompt": _prompt,
    "p-tuning": _p_tuning,
}


def default_config(method: str, family: Family, dropout: float, steps: int) -> PeftConfig:
    """The configuration of a method by name.

    Args:
        method: A name of :data:`DEFAULTS`.
        family: Of the model.
        dropout: Of the adapter, where the method has one.
        steps: Of the whole training: AdaLoRA's schedule is laid over them.

    Raises:
        AdapterError: If there is no such method; names those there are.
    """
    check_method(method)
    return DEFAULTS[method.lower()](family, dropout, steps)


def check_method(method: str) -> None:
    """Refuses what is no method's name.

    Raises:
        AdapterError: Names those there are.
    """
    if method.lower() not in DEFAULTS:
        raise AdapterError(
            f"--peft {method}: accepted: {', '.join(DEFAULTS)}, or any file with --peft-config"
        )
