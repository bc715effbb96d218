"""What the trunk must know of the client's optimizer to step its own the same way."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.optimization import Adafactor as TransformersAdafactor

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
    decoupled = type(optimizer).__name__ != "AdamW"  # of which it is the definition
    for name, value in group.items():
        if name in _LOCAL or value is None or (name == "decoupled_weight_decay" and not decoupled):
            continue
        if name in _PAIRS:
            values = value if isinstance(value, tuple | list) else (value,)
            names = [f"{_PAIRS[name]}{i}" for i in (1, 2)] if len(values) == 2 else [name]
            numbers = zip(names, values, strict=True)
            hyperparameters.update({n: float(v) for n, v in numbers if v is not None})
        elif isinstance(value, bool):
            if value or name in ("foreach", "fused", *_ON_BY_DEFAULT):
                flags[name] = value
        elif isinstance(value, int | float | torch.Tensor):
            hyperparameters[name] = float(value)
        else:
            raise OptimizerError(f"{type(optimizer).__name__}: {name}={value!r} does not travel")
    return OptimizerSettings(name_of(optimizer), hyperparameters, flags)


def name_of(optimizer: torch.optim.Optimizer) -> str:
    """The name under which a trunk knows an optimizer's class, if it does.

    A class of another library is not taken for torch's because it has the same name.
    """
    kind = type(optimizer)
    name = kind.__name__.lower()
    if kind is getattr(torch.optim, kind.__name__, None):
        return name
    if kind is TransformersAdafactor:
        return f"transformers_{name}"
    return f"{kind.__module__}.{kind.__qualname__}"


# Pairs of numbers, and what their halves are called on the wire.
_PAIRS = {"betas": "beta", "etas": "eta", "step_sizes": "step_size", "eps": "eps"}

_ON_BY_DEFAULT = ("scale_parameter", "relative_step")

# Which parameters, and what schedulers and torch keep for themselves.
_LOCAL = frozenset(
    {
        "params",
        "param_names",
        "initial_lr",
        "capturable",
        "differentiable",
    }
)
