"""Whichever optimizer holds a split model's trainable parameters also steps its trunk.

torch calls global hooks around every optimizer step, also through accelerate's wrapper. They look
whether the optimizer holds parameters of a split model; if so, they step that model's trunk with
the optimizer's class and current settings. Neither an own loop nor a Trainer needs a line.

The state of the trunk's optimizer travels with the client's: ``optimizer.state_dict()`` has it in
an entry of its own, and what ``load_state_dict()`` put there is given to the trunk before its next
step. So whatever saves and resumes an optimizer saves and resumes both. The entry says of which
adapter weights it is the state: without them it would be another training, so it is refused.
"""

from __future__ import annotations

import hashlib
import threading
import weakref
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from client_service.optimizer_spec import describe, name_of
from client_service.remote_trunk import RemoteTrunk
from shared.errors import AdapterError, OptimizerError
from shared.tensor_bytes import as_bytes

# What the names of adapter parameters have in them.
_ADAPTER = (".lora_", ".ia3_")

_models: weakref.WeakKeyDictionary[nn.Module, RemoteTrunk] = weakref.WeakKeyDictionary()
_saving: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
_stepped_by: weakref.WeakKeyDictionary[RemoteTrunk, weakref.ref[torch.optim.Optimizer]] = (
    weakref.WeakKeyDictionary()
)
_lock = threading.Lock()
_installed = False


def step_with(model: nn.Module, trunk: RemoteTrunk) -> None:
    """Lets optimizers of a model's parameters step its trunk from now on."""
    global _installed
    with _lock:
        _models[model] = trunk
        if not _installed:
            register_optimizer_step_pre_hook(_before_step)
            register_optimizer_step_post_hook(_after_step)
            _installed = True


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Refuses an optimizer that the trunk does not take while nothing has moved yet.

    Raises:
        OptimizerError: If the trunk does not accept its class, a setting or its loaded state.
        AdapterError: If what it trains on the trunk would not be saved.
    """
    for key, (model, trunk, group) in _keyed(optimizer):
        accepted = trunk.session.info.optimizers
        if trunk.has_gradients and name_of(optimizer) not in accepted:
            raise OptimizerError(
                f"optimizer {name_of(optimizer)} is not accepted by trunk "
                f"{trunk.session.address}; accepted: {', '.join(accepted)}"
            )
        settings = describe(optimizer, group)
        if trunk.has_gradients:
            _check_one_group(model, optimizer)
        if optimizer not in _saving:
            _check_saved(model, trunk)
            _saving.add(optimizer)
            optimizer.register_state_dict_post_hook(_add_trunk_state)
        loaded: Any = optimizer.state.get(key)  # type: ignore[call-overload]
        if loaded and trunk.trainable:
            _check_weights(trunk, loaded["weights"])
            trunk.restore_optimizer(loaded["state"], settings, loaded["step"])
        optimizer.state.pop(key, None)  # type: ignore[call-overload]


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for _, trunk, group in _steps_of(optimizer):
        if trunk.has_gradients:
            _stepped_by[trunk] = weakref.ref(optimizer)
            trunk.step(describe(optimizer, group))


def _add_trunk_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    added = {
        key: {
            "state": trunk.session.optimizer_state(trunk.active),
            "step": trunk.next_step - 1,
            "weights": _digest(trunk),
        }
        for key, (_, trunk, _) in _keyed(optimizer)
        # What was loaded and not given to the trunk yet is there already. Of two optimizers of one
        # model, the first steps the trunk.
        if trunk.trainable
        and key not in state["state"]
        and (stepped := _stepped_by.get(trunk)) is not None
        and stepped() is optimizer
    }
    return {**state, "state": {**state["state"], **added}}


def _check_saved(model: nn.Module, trunk: RemoteTrunk) -> None:
    if trunk.trainable and not trunk.saved_by_peft and _has_tuner(model):
        raise AdapterError(
            "this split model was wrapped by PEFT itself, which would save the ends' adapter and "
            "not the trunk's: give peft_config to SplitModelForCausalLM.from_pretrained() and none "
            "to the trainer, or leave the trunk frozen with trunk_peft_config=None"
        )


def _check_one_group(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Refuses settings that differ within the adapter (LoRA+): the trunk's is one group."""
    adapter = {id(p) for n, p in model.named_parameters() if any(m in n for m in _ADAPTER)}
    groups = [g for g in optimizer.param_groups if any(id(p) in adapter for p in g["params"])]
    if any(describe(optimizer, g) != describe(optimizer, groups[0]) for g in groups[1:]):
        raise OptimizerError(
            f"{len(groups)} parameter groups of the adapter have different settings; the trunk "
            f"steps its adapter as one: give all adapter parameters of a split model the same"
        )


def _check_weights(trunk: RemoteTrunk, digest: str) -> None:
    if _digest(trunk) != digest:
        raise OptimizerError(
            "the optimizer's state was saved with other weights of the trunk's adapter than it has "
            "now: load the adapter saved beside it first, model.load_adapter(FOLDER, 'default', "
            "is_trainable=True)"
        )


def _digest(trunk: RemoteTrunk) -> str:
    """Of the weights of the trunk's adapter in use."""
    found = hashlib.sha256()
    for name, tensor in sorted(trunk.session.adapter(trunk.active).items()):
        found.update(name.encode())
        found.update(as_bytes(tensor))
    return found.hexdigest()


def _has_tuner(model: nn.Module) -> bool:
    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


def _keyed(
    optimizer: torch.optim.Optimizer,
) -> list[tuple[str, tuple[nn.Module, RemoteTrunk, dict[str, Any]]]]:
    """The trunks an optimizer steps, under the names of their entries in its state."""
    return [(f"trunk {index}", found) for index, found in enumerate(_steps_of(optimizer))]


def _steps_of(
    optimizer: torch.optim.Optimizer,
) -> list[tuple[nn.Module, RemoteTrunk, dict[str, Any]]]:
    found = ((m, t, _group_of(m, t, optimizer)) for m, t in list(_models.items()))
    return [(model, trunk, group) for model, trunk, group in found if group is not None]


def _group_of(
    model: nn.Module, trunk: RemoteTrunk, optimizer: torch.optim.Optimizer
) -> dict[str, Any] | None:
    """The group with the proxy; else the first with a trainable parameter of the model."""
    ours = {id(p) for p in model.parameters() if p.requires_grad} - {id(trunk.proxy)}
    fallback = None
    for group in optimizer.param_groups:
        held = {id(p) for p in group["params"]}
        if id(trunk.proxy) in held:
            return group
        if fallback is None and held & ours:
            fallback = group
    return fallback
