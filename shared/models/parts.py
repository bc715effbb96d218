"""The parts by name: GPT-2's as public classes, every family's through :func:`make_part_class`."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from shared.models.families import FAMILIES
from shared.models.part import part_class, total_layers

ROLES = ("bottom", "trunk", "top")

_CLASSES: dict[tuple[str, str], Any] = {
    (name, role): part_class(name, role) for name in FAMILIES for role in ROLES
}

_GPT2Bottom: Any = _CLASSES["gpt2", "bottom"]
_GPT2Trunk: Any = _CLASSES["gpt2", "trunk"]
_GPT2Top: Any = _CLASSES["gpt2", "top"]


class GPT2BottomModel(_GPT2Bottom):
    """Embeddings and blocks ``0 .. end_layer - 1`` of a GPT-2.

    Args:
        config: The whole model's configuration (or a bottom's own, as saved with it).
        end_layer: Number of blocks kept below the trunk; may be omitted with a bottom's own.

    Raises:
        SplitError: If the model has no such blocks.
    """

    def __init__(self, config: PreTrainedConfig, end_layer: int | None = None) -> None:
        super().__init__(config, 0, _given(end_layer, config, "split_end_layer", "end_layer"))

    @classmethod
    def for_range(cls, config: PreTrainedConfig, start: int, end: int) -> GPT2BottomModel:
        """Builds the bottom that ends before block ``end``."""
        return cls(config, end)


class GPT2TrunkModel(_GPT2Trunk):
    """Blocks ``start_layer .. end_layer - 1`` of a GPT-2, hidden states in and out.

    Args:
        config: The whole model's configuration (or a trunk's own, as saved with it).
        start_layer: Index of the first block held.
        end_layer: Index of the first block above.

    Raises:
        SplitError: If the model has no such blocks.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        start_layer: int | None = None,
        end_layer: int | None = None,
    ) -> None:
        super().__init__(
            config,
            _given(start_layer, config, "split_start_layer", "start_layer"),
            _given(end_layer, config, "split_end_layer", "end_layer"),
        )


class GPT2TopModel(_GPT2Top):
    """Blocks ``start_layer …``, final norm and language-model head of a GPT-2.

    Args:
        config: The whole model's configuration (or a top's own, as saved with it).
        start_layer: Index of the first block held.

    Raises:
        SplitError: If the model has no such blocks.
    """

    def __init__(self, config: PreTrainedConfig, start_layer: int | None = None) -> None:
        start = _given(start_layer, config, "split_start_layer", "start_layer")
        super().__init__(config, start, total_layers(config))

    @classmethod
    def for_range(cls, config: PreTrainedConfig, start: int, end: int) -> GPT2TopModel:
        """Builds the top that begins with block ``start``."""
        return cls(config, start)


_PUBLIC = {
    ("gpt2", "bottom"): GPT2BottomModel,
    ("gpt2", "trunk"): GPT2TrunkModel,
    ("gpt2", "top"): GPT2TopModel,
}


def get_part_class(model_type: str, role: str) -> Any:
    """Returns the class of a part of a family in ``FAMILIES``."""
    return _PUBLIC.get((model_type, role), _CLASSES[model_type, role])


def build_part(config: PreTrainedConfig, role: str, start: int, end: int) -> Any:
    """Builds a part that holds blocks ``start .. end - 1``, with fresh weights."""
    return get_part_class(config.model_type, role).for_range(config, start, end)


def _given(value: int | None, config: PreTrainedConfig, attribute: str, name: str) -> int:
    value = getattr(config, attribute, None) if value is None else value
    if value is None:
        raise TypeError(f"{name} is needed with a whole model's configuration")
    return int(value)
