"""What changes on the client's side in training, as named tensors and JSON, and back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from client_service.split_ends import end_of
from client_service.training import TrainingState
from shared.adapters.adalora import tuner_of
from shared.adapters.adalora_state import allocator_state, check_allocator_state, restore_allocator
from shared.errors import CheckpointError
from shared.models.families import family_of

Tensors = dict[str, torch.Tensor]

_ALLOCATOR, _TRUNK_KEPT = "allocator/", "trunk_kept/"


def parameters_by_side(model: Any) -> dict[str, Tensors]:
    """The client's trained parameters, of the ``bottom`` and of the ``top``."""
    family = family_of(model.whole_config.model_type)
    sides: dict[str, Tensors] = {"bottom": {}, "top": {}}
    for name, parameter in _own_parameters(model):
        end = end_of(name.removeprefix("base_model.model."), family, model.split)
        sides[end][name] = parameter
    return sides


def restore_parameters(source: str, model: Any, saved: Tensors) -> None:
    """Gives the client's trained parameters their saved values.

    Args:
        source: What they were read from, for messages.
        model: A split model.
        saved: By name.

    Raises:
        CheckpointError: If a name, shape or dtype is not the model's; nothing was changed.
    """
    own = dict(_own_parameters(model))
    if odd := own.keys() ^ saved.keys():
        raise CheckpointError(
            f"{source}: {len(odd)} trained parameters are on one side only, such as {min(odd)}: it "
            f"is of another adapter"
        )
    for name, parameter in own.items():
        if saved[name].shape != parameter.shape or saved[name].dtype != parameter.dtype:
            raise CheckpointError(
                f"{source}: {name} is {saved[name].dtype} {tuple(saved[name].shape)}, the model's "
                f"{parameter.dtype} {tuple(parameter.shape)}"
            )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(saved[name])


def optimizer_state(state: TrainingState) -> tuple[Tensors, dict[str, Any]]:
    """The optimizer's tensors as ``PARAMETER/KEY``, and the rest of it for JSON."""
    tensors: Tensors = {}
    numbers: dict[str, dict[str, Any]] = {}
    for name, parameter in _trained(state.model):
        for key, value in state.optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                tensors[f"{name}/{key}"] = value
            else:
                numbers.setdefault(name, {})[key] = value
    return tensors, {"groups": _settings(state.optimizer), "numbers": numbers}


def restore_optimizer(
    source: str, state: TrainingState, tensors: Tensors, saved: dict[str, Any]
) -> None:
    """Gives a fresh optimizer what :func:`optimizer_state` copied.

    Args:
        source: What it was read from, for messages.
        state: With the optimizer.
        tensors: Of its state.
        saved: The rest.

    Raises:
        CheckpointError: If it is not of such an optimizer.
    """
    by_name: dict[str, dict[str, Any]] = saved["numbers"]
    for entry, tensor in tensors.items():
        name, _, key = entry.rpartition("/")
        by_name.setdefault(name, {})[key] = tensor
    names = [name for name, _ in _trained(state.model)]
    if foreign := by_name.keys() - set(names):
        raise CheckpointError(f"{source}: {min(foreign)} is not trained here")
    present = state.optimizer.state_dict()
    groups = present["param_groups"]
    if [g.keys() - {"params"} for g in groups] != [g.keys() for g in saved["groups"]]:
        raise CheckpointError(f"{source}: is of another optimizer")
    for group, settings in zip(groups, saved["groups"], strict=True):
        group.update({k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()})
    indexed = {i: by_name[name] for i, name in enumerate(names) if name in by_name}
    state.optimizer.load_state_dict({"state": indexed, "param_groups": groups})


def allocation(model: Any) -> Tensors:
    """AdaLoRA: the allocator of this side, and what the trunk keeps; empty without it."""
    tuner = tuner_of(model)
    if tuner is None:
        return {}
    found = {f"{_ALLOCATOR}{n}": t for n, t in allocator_state(tuner).items()}
    theirs = getattr(tuner, "trunk_pattern", None) or {}
    return found | {f"{_TRUNK_KEPT}{n}": kept for n, kept in theirs.items()}


def restore_allocation(model: Any, saved: Tensors) -> None:
    """Puts what :func:`allocation` copied in place again.

    Args:
        model: A split model.
        saved: The entries.

    Raises:
        AdapterError: If they are not of this adapter.
    """
    tuner = tuner_of(model)
    if tuner is None:
        return
    ours = {n.removeprefix(_ALLOCATOR): t for n, t in saved.items() if n.startswith(_ALLOCATOR)}
    check_allocator_state(tuner, ours)
    restore_allocator(tuner, ours)
    theirs = {n.removeprefix(_TRUNK_KEPT): t for n, t in saved.items() if n.startswith(_TRUNK_KEPT)}
    if theirs:
        tuner.trunk_pattern = theirs


def _settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]


def _trained(model: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """What the client's optimizer holds, in its order; the proxy is among it."""
    return ((n, p) for n, p in model.named_parameters() if p.requires_grad)


def _own_parameters(model: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    return ((n, p) for n, p in _trained(model) if not n.endswith(".proxy"))
