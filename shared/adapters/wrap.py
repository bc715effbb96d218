"""Wrapping a part or a model with an adapter, reproducibly."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable
from typing import Any

from peft import PeftConfig, PeftModelForCausalLM
from torch import nn

from shared.adapters.adalora import check_rank_pattern, tuner_of
from shared.adapters.config import check_config
from shared.errors import AdapterError
from shared.models.quantization import transposed
from shared.seeding import keyed_generator


def wrap(
    model: nn.Module,
    config: PeftConfig,
    seed: int,
    place: str,
    wrapper: Any = PeftModelForCausalLM,
) -> Any:
    """Puts a fresh adapter around a model.

    Args:
        model: A part, or the client's model with a hole.
        config: The adapter's configuration; a copy is used, because PEFT writes into it.
        seed: Fixes the fresh weights, with ``place``.
        place: Which part this is, so that parts do not start from the same numbers.
        wrapper: The ``PeftModel`` class to build.

    Returns:
        The wrapped model; only adapter weights require gradients.

    Raises:
        AdapterError: If the configuration is refused here or by PEFT.
    """
    config = fitted(config, model, place)
    try:
        with keyed_generator("adapter", seed, place), warnings.catch_warnings():
            # A part has only some of the modules that the patterns of the whole model name.
            warnings.filterwarnings("ignore", r"The following \w+_pattern keys", RuntimeWarning)
            wrapped = wrapper(model, config)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, re.error) as error:
        raise AdapterError(f"PEFT cannot put this adapter on the {place}: {error}") from error
    if (tuner := tuner_of(wrapped)) is not None:
        # PEFT looks at it when weights are loaded, and then stumbles over what it does not know.
        check_rank_pattern(tuner, config.rank_pattern or {})
        # A constant; PEFT trains it, unsaved, where it follows a base layer to a device or dtype.
        for name, parameter in wrapped.named_parameters():
            if ".ranknum." in name:
                parameter.requires_grad_(False)
    return wrapped


def fitted(config: PeftConfig, model: nn.Module, place: str) -> PeftConfig:
    """A copy of a configuration, for training around a certain model.

    Raises:
        AdapterError: If it is refused, or known to fail on such a model.
    """
    check_config(config)
    config = copy.deepcopy(config)
    config.inference_mode = False
    if hasattr(config, "fan_in_fan_out"):
        # Of what is there, not of the family: quantised layers are ordinary ones.
        config.fan_in_fan_out = transposed(model)
    if getattr(model, "is_loaded_in_8bit", False) and getattr(config, "use_dora", False):
        raise AdapterError(
            f"use_dora on the {place}, whose weights are int8: DoRA fails there on a CPU in PEFT "
            f"itself; accepted are nf4 or unquantised weights"
        )
    return config


def check_modules_to_save(config: PeftConfig, model: nn.Module) -> None:
    """Refuses names in ``modules_to_save`` that PEFT would silently find nowhere in a part.

    Raises:
        AdapterError: Names them.
    """
    absent = set(config.modules_to_save or ()) - present_modules(config.modules_to_save, model)
    if absent:
        raise AdapterError(
            f"modules_to_save {sorted(absent)} are not in this part: nothing would be trained there"
        )


def present_modules(wanted: Iterable[str] | None, model: nn.Module) -> set[str]:
    """Those of some ``modules_to_save`` that name a module with parameters of a model."""
    names = [n for n, m in model.named_modules() if next(m.parameters(), None) is not None]
    return {w for w in wanted or () if any(f".{n}".endswith(f".{w}") for n in names)}
