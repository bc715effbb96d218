"""Whichever optimizer holds a split model's trainable parameters also steps its trunk.

torch calls a global hook after every optimizer step, also through accelerate's wrapper. The hook
looks whether the optimizer holds parameters of a split model; if so, it steps that model's trunk
with the optimizer's class and current settings. Neither an own loop nor a Trainer needs a line.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from client_service.optimizer_spec import describe
from client_service.remote_trunk import RemoteTrunk

_models: weakref.WeakKeyDictionary[nn.Module, RemoteTrunk] = weakref.WeakKeyDictionary()
_lock = threading.Lock()
_installed = False


def step_with(model: nn.Module, trunk: RemoteTrunk) -> None:
    """Lets optimizers of a model's parameters step its trunk from now on."""
    global _installed
    with _lock:
        _models[model] = trunk
        if not _installed:
            register_optimizer_step_post_hook(_after_step)
            _installed = True


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for model, trunk in list(_models.items()):
        group = _group_of(model, trunk, optimizer)
        if group is not None:
            trunk.step(describe(optimizer, group))


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
