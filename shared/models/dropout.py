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


def draws_dropout(model: nn.Module) -> bool:
    """Tells whether a forward in training mode draws random numbers."""
    return any(
        (isinstance(m, nn.Dropout) and m.p > 0) or (getattr(m, "attention_dropout", 0.0) or 0.0) > 0
        for m in model.modules()
    )
