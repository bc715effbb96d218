"""Reads off the client's PEFT model what the trunk must know of the adapters in its blocks.

PEFT's own objects are the truth: whatever ordinary code did to them is read anew from the modules,
their parameters, buffers and plain attributes. What the trunk could not do as well is refused here
by name, before anything is sent.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key
from torch import nn

from shared.adapters.structure import (
    NOT_SENT,
    AdapterSpec,
    LayerState,
    Setting,
    Structure,
    Value,
    base_name,
    check_adapter_name,
    dropout_of,
    is_beginning,
    outside,
    own_dropout,
    puts_layers,
    scaling_of,
    setting,
    tuner_class,
)
from shared.errors import AdapterError, ModelMismatchError
from shared.skeleton import RemoteTensor

Blocks = Sequence[tuple[str, nn.Module]]
"""The trunk's blocks of the client's model, hollow, by their full names; and what else is an input
of the trunk's function, such as the rotary embedding."""

_ALPHAS = ("lora_alpha", "alpha")


def adapter_tensors(blocks: Blocks, dtype: torch.dtype) -> list[tuple[Value, torch.Tensor]]:
    """Lists every tensor of the trunk's blocks that is here: of adapters, norms and biases.

    Args:
        blocks: As in :data:`Blocks`.
        dtype: What the trunk computes in.

    Returns:
        Each once, with all its names.

    Raises:
        AdapterError: If a base matrix is to be trained.
        ModelMismatchError: If the model was converted to another dtype than the trunk's.
    """
    found: dict[tuple[int, bool], tuple[torch.Tensor, list[str]]] = {}
    for path, module in _walk(blocks):
        if dtype != torch.float32 and not getattr(module, "cast_input_dtype_enabled", True):
            raise AdapterError(
                f"{path} is not to cast its input, which the trunk does: accepted is that on a "
                f"trunk that computes in float32"
            )
        for is_buffer, kind in ((False, module._parameters), (True, module._buffers)):
            for name, tensor in kind.items():
                if isinstance(tensor, RemoteTensor):
                    _check_base(f"{path}.{name}", tensor, dtype)
                elif tensor is not None:
                    entry = found.setdefault((id(tensor), is_buffer), (tensor, []))
                    entry[1].append(base_name(f"{path}.{name}"))
    return [
        (Value(tuple(names), tensor.requires_grad, is_buffer), tensor)
        for (_, is_buffer), (tensor, names) in found.items()
    ]


def check_shared(
    layers: nn.Module, tensors: Sequence[tuple[Value, torch.Tensor]], held: str
) -> None:
    """Refuses what is trained in several places where that would not be the whole model's.

    Its gradient is a sum over the places, made in another order. In float32 that is rounding; what
    has fewer digits, or quantises what it is given, shows it. And which quantised layers share may
    hang on how their matrices are packed, which is not known here.

    Args:
        layers: All blocks of the model.
        tensors: Of the trunk's blocks, as of :func:`adapter_tensors`.
        held: How the trunk holds its matrices; empty for float32.

    Raises:
        AdapterError: Names a tensor.
    """
    if not held or not any(value.requires_grad for value, _ in tensors):
        return
    seen: set[int] = set()
    for name, parameter in layers.named_parameters(remove_duplicate=False):
        if parameter.requires_grad and id(parameter) in seen:
            raise AdapterError(
                f"{base_name(name)} is trained for several layers: on a trunk in {held} accepted "
                f"are adapters of which each layer has its own"
            )
        seen.add(id(parameter))


def adapter_structure(blocks: Blocks, configs: Mapping[str, PeftConfig]) -> Structure:
    """Describes the adapters in the trunk's blocks and the state of their layers.

    Args:
        blocks: As in :data:`Blocks`.
        configs: The model's ``peft_config``; empty without an adapter.

    Raises:
        AdapterError: If an adapter cannot be had on a trunk, or a layer in there was changed in a
            way that would have no effect; names it.
    """
    walked = list(_walk(blocks))
    own = {id(block) for _, block in blocks}
    places = _Places()
    layers = []
    for path, module in walked:
        if id(module) in own and isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            raise AdapterError(
                f"{path}: an adapter around a whole block of the trunk is not accepted: accepted "
                f"are adapters of layers inside the blocks"
            )
        if not places.add(path, module):
            continue
        state = _state(path, module, frozenset(configs))
        if state is not None:
            layers.append(state)
    modules = dict(walked)
    adapters = tuple(
        _spec(name, config, places, modules)
        for name, config in configs.items()
        if places.has(name, config)
    )
    return Structure(adapters, tuple(layers))


def mixed_adapter_names(blocks: Blocks) -> tuple[str, ...]:
    """The adapter of each row, where a call says ``adapter_names=``; else nothing.

    PEFT hands them to its layers by hooks, which stand only while that call runs.

    Raises:
        AdapterError: If PEFT hands its layers something else as well.
    """
    for _, module in _walk(blocks):
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, functools.partial) and hook.keywords:
                if hook.keywords.keys() != {"adapter_names"}:
                    raise AdapterError(
                        f"{', '.join(hook.keywords)} for the layers of the trunk's blocks is not "
                        f"accepted: adapter_names is"
                    )
                return tuple(hook.keywords["adapter_names"])
    return ()


class _Places:
    """Where each adapter is."""

    def __init__(self) -> None:
        self.targets: dict[str, list[str]] = {}
        self.saved: dict[str, list[str]] = {}

    def add(self, path: str, module: nn.Module) -> bool:
        """Notes the adapters of one module; tells whether it has any, or none of PEFT's layers."""
        if isinstance(module, AuxiliaryTrainingWrapper):
            names, places = set(getattr(module, "modules_to_save", {})), self.saved
        elif isinstance(module, BaseTunerLayer):
            names, places = module._get_available_adapters(), self.targets
        else:
            return True
        for name in names:
            places.setdefault(name, []).append(path)
        return bool(names)

    def has(self, name: str, config: PeftConfig) -> bool:
        """Tells whether any of an adapter is in the trunk's blocks; refuses what cannot be."""
        is_there = name in self.targets or name in self.saved
        peft_type = config.peft_type.value
        if is_there or not (config.is_prompt_learning or puts_layers(peft_type)):
            tuner_class(peft_type)
        return is_there


def _walk(blocks: Blocks) -> Iterator[tuple[str, nn.Module]]:
    for prefix, block in blocks:
        yield from block.named_modules(prefix=prefix, remove_duplicate=False)


def _check_base(name: str, tensor: RemoteTensor, dtype: torch.dtype) -> None:
    if tensor.requires_grad:
        raise AdapterError(
            f"{name} is to be trained, but is a base matrix of the trunk's blocks, which its "
            f"tenants share: accepted are adapters, norms and biases"
        )
    if tensor.dtype != dtype:
        raise ModelMismatchError(
            f"{name} was converted to {tensor.dtype}, this trunk computes in {dtype}: accepted is "
            f"a model of the trunk's dtype, and autocast"
        )


def _state(path: str, module: nn.Module, adapters: frozenset[str]) -> LayerState | None:
    if isinstance(module, BaseTunerLayer):
        if module.merged:
            raise AdapterError(
                f"{path}: its adapter was merged, which the trunk's blocks cannot be: accepted is "
                f"an adapter beside its base weights; `trunkline export --merge` merges"
            )
        return LayerState(
            path,
            tuple(module.active_adapters),
            module.disable_adapters,
            scaling_of(module),
            own_dropout(module),
            outside(module, adapters, _is_remote),
        )
    if isinstance(module, AuxiliaryTrainingWrapper):
        return LayerState(path, tuple(module.active_adapters), module.disable_adapters)
    dropout = dropout_of(module)
    return None if dropout is None else LayerState(path, dropout=dropout)


def _is_remote(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, RemoteTensor)


def _spec(
    name: str, config: PeftConfig, places: _Places, modules: Mapping[str, Any]
) -> AdapterSpec:
    check_adapter_name(name)
    targets = tuple(places.targets.get(name, ()))
    ranks = _by_module(config, "rank_pattern", getattr(config, "r", None), targets)
    if hasattr(config, "rank_pattern"):
        ranks |= _resized(name, targets, modules, ranks, getattr(config, "r", None))
    alpha = next((field for field in _ALPHAS if hasattr(config, field)), "")
    alphas = _by_module(config, "alpha_pattern", getattr(config, alpha, None), targets)
    settings = dict(_settings(config, alpha if len(alphas) == len(targets) else ""))
    feedforward = [p for p in targets if getattr(modules[p], "is_feedforward", False)]
    return AdapterSpec(
        name=name,
        peft_type=config.peft_type.value,
        target_modules=targets,
        feedforward_modules=tuple(feedforward),
        modules_to_save=tuple(places.saved.get(name, ())),
        ranks={path: int(rank) for path, rank in ranks.items()},
        alphas={path: float(number) for path, number in alphas.items()},
        settings=settings,
    )


def _resized(
    name: str,
    targets: tuple[str, ...],
    modules: Mapping[str, Any],
    said: dict[str, Any],
    usual: Any,
) -> dict[str, Any]:
    """Ranks that layers have and no pattern says: those that AdaLoRA left when it was saved."""
    kept = {path: modules[path].__dict__.get("r") for path in targets}
    own = {path: ranks.get(name) for path, ranks in kept.items() if isinstance(ranks, dict)}
    return {p: rank for p, rank in own.items() if type(rank) is int and rank != said.get(p, usual)}


def _settings(config: PeftConfig, without: str) -> Iterator[tuple[str, Setting]]:
    """Fields that differ from PEFT's defaults and say what an adapter computes."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        # How an adapter began is in its values; what more it changes shows in the digests.
        began = is_beginning(field.name) and (value is None or isinstance(value, bool | str))
        if field.name in NOT_SENT or field.name == without or began or value == _default(field):
            continue
        value = setting(type(config), field.name, value)
        yield field.name, getattr(value, "value", value)


def _default(field: dataclasses.Field[Any]) -> Any:
    factory = field.default_factory
    return field.default if factory is dataclasses.MISSING else factory()


def _by_module(
    config: PeftConfig, field: str, usual: Any, targets: tuple[str, ...]
) -> dict[str, Any]:
    """What a pattern's numbers come to for each module, where that is not the usual number."""
    pattern = getattr(config, field, None)
    fractional = field == "alpha_pattern" and isinstance(usual, float)
    if not pattern and not fractional:
        return {}
    pattern = pattern or {}
    if any(isinstance(number, list) for number in pattern.values()):
        return {}  # which of its ranks are kept, by what it has learned: in the values
    found = {p: pattern.get(get_pattern_key(list(pattern), p), usual) for p in targets}
    for path, number in found.items():
        wrong = not isinstance(number, int | float) or isinstance(number, bool)
        if wrong or (field == "rank_pattern" and not isinstance(number, int)):
            raise AdapterError(
                f"{type(config).__name__} with {field} of {number!r} for {path} is not accepted "
                f"on the trunk's blocks: numbers are, and whole ones as ranks"
            )
    return found if fractional else {p: n for p, n in found.items() if n != usual}
