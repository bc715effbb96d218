"""What changes in training, as named tensors and JSON, and back."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from peft import AdaLoraModel

from client_service.training import TrainingState
from shared.errors import CheckpointError
from shared.skeleton import RemoteTensor

Tensors = dict[str, torch.Tensor]

_AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")
"""What AdaLoRA's allocator keeps of each parameter."""


def model_state(model: Any) -> Tensors:
    """What is trained, and the buffers of adapters, which may be drawn anew in another process."""
    kept = {n: p for n, p in model.named_parameters() if p.requires_grad}
    adapters = set(getattr(model, "peft_config", {}))
    for name, buffer in model.named_buffers():
        if adapters & set(name.split(".")) and not isinstance(buffer, RemoteTensor):
            kept[name] = buffer
    return kept


def restore_model(source: str, model: Any, saved: Tensors) -> None:
    """Gives what is trained its saved values.

    Args:
        source: What they were read from, for messages.
        model: A split model.
        saved: By name.

    Raises:
        CheckpointError: If a name, shape or dtype is not the model's; nothing was changed.
    """
    own = model_state(model)
    if odd := own.keys() ^ saved.keys():
        raise CheckpointError(
            f"{source}: {len(odd)} trained tensors are on one side only, such as {min(odd)}: it "
            f"is of another adapter"
        )
    for name, tensor in own.items():
        if saved[name].shape != tensor.shape or saved[name].dtype != tensor.dtype:
            raise CheckpointError(
                f"{source}: {name} is {saved[name].dtype} {tuple(saved[name].shape)}, the model's "
                f"{tensor.dtype} {tuple(tensor.shape)}"
            )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(saved[name])


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


def allocation(model: Any) -> tuple[Tensors, dict[str, Any]]:
    """AdaLoRA: the averages of its allocator, and the ranks it kept last; empty without it."""
    found = _allocator(model)
    if found is None:
        return {}, {}
    allocator, config = found
    averages = {
        f"{key}/{name}": tensor
        for key in _AVERAGES
        for name, tensor in getattr(allocator, key).items()
    }
    return averages, {"rank_pattern": copy.deepcopy(config.rank_pattern)}


def restore_allocation(model: Any, tensors: Tensors, saved: dict[str, Any]) -> None:
    """Puts what :func:`allocation` copied in place again."""
    found = _allocator(model)
    if found is None:
        return
    allocator, config = found
    for key in _AVERAGES:
        prefix = f"{key}/"
        own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        setattr(allocator, key, own)
    config.rank_pattern = saved.get("rank_pattern")


def _allocator(model: Any) -> tuple[Any, Any] | None:
    tuner = getattr(model, "base_model", None)
    if not isinstance(tuner, AdaLoraModel):
        return None
    return tuner.rankallocator, tuner.peft_config[tuner.trainable_adapter_name]


def _settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]


def _trained(model: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """What the optimizer holds, in its order."""
    return ((n, p) for n, p in model.named_parameters() if p.requires_grad)
