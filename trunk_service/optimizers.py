"""The optimizers a tenant may choose for its adapter, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.optimization import Adafactor as TransformersAdafactor

from shared.errors import OptimizerError


@dataclass(frozen=True)
class OptimizerSpec:
    """An optimizer as a client describes it: torch's class name in lower case, and its settings.

    Pairs travel as two numbers, ``betas`` as ``beta1`` and ``beta2``.
    """

    name: str
    hyperparameters: Mapping[str, float] = field(default_factory=dict)
    flags: Mapping[str, bool] = field(default_factory=dict)


@dataclass(frozen=True)
class _Kind:
    build: Any
    hyperparameters: frozenset[str]
    flags: frozenset[str] = frozenset()
    pairs: Mapping[str, tuple[float | None, float | None]] = field(default_factory=dict)
    """Settings that are pairs, with torch's defaults; they travel as NAME1 and NAME2."""
    negative: frozenset[str] = frozenset()
    """Settings that may be below zero."""
    optional: frozenset[str] = frozenset()
    """Settings that are None unless given, though the class has another default."""


_LARGEST = torch.finfo(torch.float32).max
_FLAGS = frozenset({"maximize", "foreach"})
_LR = frozenset({"lr", "weight_decay"})
_ADAM = _LR | {"eps"}
_BETAS: dict[str, tuple[float | None, float | None]] = {"betas": (0.9, 0.999)}
_DECOUPLED = frozenset({"decoupled_weight_decay"})

KINDS: dict[str, _Kind] = {
    "adamw": _Kind(torch.optim.AdamW, _ADAM, _FLAGS | {"amsgrad", "fused"}, _BETAS),
    "adam": _Kind(torch.optim.Adam, _ADAM, _FLAGS | _DECOUPLED | {"amsgrad", "fused"}, _BETAS),
    "sgd": _Kind(torch.optim.SGD, _LR | {"momentum", "dampening"}, _FLAGS | {"nesterov", "fused"}),
    "adafactor": _Kind(
        torch.optim.Adafactor,
        _LR | {"beta2_decay", "d"},
        _FLAGS,
        {"eps": (None, 1e-3)},
        negative=frozenset({"beta2_decay"}),
    ),
    "transformers_adafactor": _Kind(
        TransformersAdafactor,
        _LR | {"clip_threshold", "decay_rate", "beta1"},
        frozenset({"scale_parameter", "relative_step", "warmup_init"}),
        {"eps": (1e-30, 1e-3)},
        negative=frozenset({"decay_rate"}),
        optional=frozenset({"lr"}),
    ),
    "adagrad": _Kind(
        torch.optim.Adagrad,
        _ADAM | {"lr_decay", "initial_accumulator_value"},
        _FLAGS | {"fused"},
    ),
    "adadelta": _Kind(torch.optim.Adadelta, _ADAM | {"rho"}, _FLAGS),
    "adamax": _Kind(torch.optim.Adamax, _ADAM, _FLAGS, _BETAS),
    "nadam": _Kind(torch.optim.NAdam, _ADAM | {"momentum_decay"}, _FLAGS | _DECOUPLED, _BETAS),
    "radam": _Kind(torch.optim.RAdam, _ADAM, _FLAGS | _DECOUPLED, _BETAS),
    "rmsprop": _Kind(torch.optim.RMSprop, _ADAM | {"alpha", "momentum"}, _FLAGS | {"centered"}),
    "rprop": _Kind(
        torch.optim.Rprop,
        frozenset({"lr"}),
        _FLAGS,
        {"etas": (0.5, 1.2), "step_sizes": (1e-6, 50.0)},
    ),
    "asgd": _Kind(torch.optim.ASGD, _LR | {"lambd", "alpha", "t0"}, _FLAGS),
}
"""Optimizers a trunk takes, under the names that clients give."""

# What a group may not change once there is state, because the state would not fit it.
_FIXED = ("amsgrad", "centered", "beta1")


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
        for name in _FIXED:
            if bool(settings.get(name)) != bool(group.get(name)):
                raise OptimizerError(
                    f"{spec.name}: {name} cannot change in the middle of a session"
                )
        group.update(settings)


def _settings(spec: OptimizerSpec) -> dict[str, Any]:
    if spec.name not in KINDS:
        raise OptimizerError(
            f"optimizer {spec.name!r} is not accepted; accepted: {', '.join(KINDS)}"
        )
    kind = KINDS[spec.name]
    halves = {_half(pair, i): (pair, i) for pair in kind.pairs for i in (0, 1)}
    accepted = kind.hyperparameters | halves.keys()
    if unknown := [n for n in spec.hyperparameters if n not in accepted]:
        raise OptimizerError(_unknown(spec.name, unknown, accepted))
    if unknown := [n for n in spec.flags if n not in kind.flags]:
        raise OptimizerError(_unknown(spec.name, unknown, kind.flags))
    for name, value in spec.hyperparameters.items():
        lowest = -_LARGEST if name in kind.negative else 0.0
        if not lowest <= value <= _LARGEST:
            raise OptimizerError(
                f"{spec.name}: {name}={value} is not a number from {lowest:.3g} to {_LARGEST:.3g}"
            )
    settings: dict[str, Any] = dict.fromkeys(kind.optional)
    pairs = {pair: list(default) for pair, default in kind.pairs.items()}
    for name, value in spec.hyperparameters.items():
        if name in halves:
            pair, index = halves[name]
            pairs[pair][index] = value
        else:
            settings[name] = value
    return {**settings, **spec.flags, **{pair: tuple(values) for pair, values in pairs.items()}}


def _half(pair: str, index: int) -> str:
    """``betas`` travel as ``beta1`` and ``beta2``, ``eps`` as ``eps1`` and ``eps2``."""
    return f"{pair if pair == 'eps' else pair.removesuffix('s')}{index + 1}"


def _unknown(name: str, given: list[str], accepted: frozenset[str]) -> str:
    return f"{name} takes no {', '.join(given)}; accepted: {', '.join(sorted(accepted))}"
