"""What the trunk must know of the client's optimizer to step its own the same way."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from shared.errors import OptimizerError


@dataclass(frozen=True)
class OptimizerSettings:
    """An optimizer by torch's class name in lower case, with its current settings."""

    name: str
    hyperparameters: dict[str, float] = field(default_factory=dict)
    flags: dict[str, bool] = field(default_factory=dict)


def adamw(lr: float, **hyperparameters: float) -> OptimizerSettings:
    """AdamW with torch's defaults but what is given (``beta1``, ``eps``, ``weight_decay`` …)."""
    return OptimizerSettings("adamw", {"lr": lr, **hyperparameters})


def describe(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> OptimizerSettings:
    """Describes an optimizer as it will take its next step on one parameter group.

    Args:
        optimizer: Any; the trunk decides whether it accepts the class.
        group: The parameter group whose settings the trunk's parameters follow.

    Raises:
        OptimizerError: If a setting is neither a number nor a flag.
    """
    hyperparameters: dict[str, float] = {}
    flags: dict[str, bool] = {}
    for name, value in group.items():
        if name in _LOCAL or value is None:
            continue
        if name == "betas":
            hyperparameters["beta1"], hyperparameters["beta2"] = map(float, value)
        elif isinstance(value, bool):
            if value or name in ("foreach", "fused"):
                flags[name] = value
        elif isinstance(value, int | float | torch.Tensor):
            hyperparameters[name] = float(value)
        else:
            raise OptimizerError(f"{type(optimizer).__name__}: {name}={value!r} does not travel")
    return OptimizerSettings(type(optimizer).__name__.lower(), hyperparameters, flags)


# Which parameters, and what schedulers and torch keep for themselves.
_LOCAL = frozenset(
    {
        "params",
        "param_names",
        "initial_lr",
        "capturable",
        "differentiable",
        "decoupled_weight_decay",
    }
)
