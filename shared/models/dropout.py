"""A model's own dropout layers, whatever its family calls them."""

from __future__ import annotations

from torch import nn


def set_dropout(model: nn.Module, probability: float) -> None:
    """Sets the probability of a model's own dropout layers (before an adapter adds its own)."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability
        if hasattr(module, "attention_dropout"):
            setattr(module, "attention_dropout", probability)  # noqa: B010 (not typed)
