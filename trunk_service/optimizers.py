"""The optimizers a tenant may choose for its adapter, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from shared.errors import OptimizerError


@dataclass(frozen=True)
class OptimizerSpec:
    """An optimizer as a client describes it: torch's class name in lower case, and its settings.

    ``betas`` travel as ``beta1`` and ``beta2``.
    """

    name: str
    hyperparameters: Mapping[str, float] = field(default_factory=dict)
    flags: Mapping[str, bool] = field(default_factory=dict)


@dataclass(frozen=True)
class _Kind:
    build: Any
    hyperparameters: frozenset[str]
    flags: frozenset[str]


_ADAM = frozenset({"lr", "beta1", "beta2", "eps", "weight_decay"})
_LARGEST = torch.finfo(torch.float32).max
_COMMON_FLAGS = frozenset({"maximize", "foreach"})

KINDS: dict[str, _Kind] = {
    "adamw": _Kind(torch.optim.AdamW, _ADAM, _COMMON_FLAGS | {"amsgrad", "fused"}),
    "adam": _Kind(torch.optim.Adam, _ADAM, _COMMON_FLAGS | {"amsgrad", "fused"}),
    "sgd": _Kind(
        torch.optim.SGD,
        frozenset({"lr", "momentum", "dampening", "weight_decay"}),
        _COMMON_FLAGS | {"nesterov", "fused"},
    ),
}


def build_optimizer(
    spec: OptimizerSpec, parameters: list[torch.nn.Parameter]
) -> torch.optim.Optimizer:
    """Builds an optimizer over a tenant's parameters.

    Raises:
        OptimizerError: If the name or a setting is unknown, or torch refuses a value.
    """
    settings = _settings(spec)
    try:
        optimizer: torch.optim.Optimizer = KINDS[spec.name].build(parameters, **settings)
    except (ValueError, TypeError, RuntimeError) as error:
        raise OptimizerError(f"{spec.name}: {error}") from error
    return optimizer


def update_settings(optimizer: torch.optim.Optimizer, spec: OptimizerSpec) -> None:
    """Sets the hyperparameters for the next step (a schedule moves them).

    Raises:
        OptimizerError: As :func:`build_optimizer`, or if the name is another optimizer's.
    """
    # Built anew, so that torch checks the values and what is not given is torch's default again.
    fresh = build_optimizer(spec, [torch.nn.Parameter(torch.zeros(1))])
    if type(optimizer) is not KINDS[spec.name].build:
        raise OptimizerError(
            f"this session steps with {type(optimizer).__name__}; {spec.name} was given: "
            f"an optimizer cannot be exchanged in the middle of a session"
        )
    settings = {k: v for k, v in fresh.param_groups[0].items() if k != "params"}
    for group in optimizer.param_groups:
        if settings.get("amsgrad") != group.get("amsgrad"):
            raise OptimizerError(f"{spec.name}: amsgrad cannot change in the middle of a session")
        group.update(settings)


def _settings(spec: OptimizerSpec) -> dict[str, Any]:
    if spec.name not in KINDS:
        raise OptimizerError(
            f"optimizer {spec.name!r} is not accepted; accepted: {', '.join(KINDS)}"
        )
    kind = KINDS[spec.name]
    if unknown := [n for n in spec.hyperparameters if n not in kind.hyperparameters]:
        raise OptimizerError(_unknown(spec.name, unknown, kind.hyperparameters))
    if unknown := [n for n in spec.flags if n not in kind.flags]:
        raise OptimizerError(_unknown(spec.name, unknown, kind.flags))
    if bad := {n: v for n, v in spec.hyperparameters.items() if not 0 <= v <= _LARGEST}:
        raise OptimizerError(f"{spec.name}: {bad} are not numbers from 0 to {_LARGEST:.3g}")
    settings: dict[str, Any] = {**spec.hyperparameters, **spec.flags}
    if "beta1" in settings or "beta2" in settings:
        settings["betas"] = (settings.pop("beta1", 0.9), settings.pop("beta2", 0.999))
    return settings


def _unknown(name: str, given: list[str], accepted: frozenset[str]) -> str:
    return f"{name} takes no {', '.join(given)}; accepted: {', '.join(sorted(accepted))}"
