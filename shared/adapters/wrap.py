"""Wrapping a part or a model with an adapter, reproducibly."""

from __future__ import annotations

import copy
import re
from typing import Any

from peft import PeftConfig, PeftModelForCausalLM
from torch import nn

from shared.adapters.config import check_config
from shared.errors import AdapterError
from shared.models.families import family_of
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
    check_config(config)
    config = copy.deepcopy(config)
    config.inference_mode = False
    if hasattr(config, "fan_in_fan_out"):
        family = family_of(model.config.model_type)  # type: ignore[union-attr,arg-type]
        config.fan_in_fan_out = family.transposed_linear
    try:
        with keyed_generator("adapter", seed, place):
            return wrapper(model, config)
    except (ValueError, TypeError, KeyError, AttributeError, re.error) as error:
        raise AdapterError(f"PEFT cannot put this adapter on the {place}: {error}") from error
