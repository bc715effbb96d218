"""Puts a tenant's adapter around the trunk's blocks with stock PEFT, from names and numbers alone.

The configuration that PEFT is given is made here. Of what a tenant says, only names of modules of
the blocks, numbers, booleans and words that PEFT enumerates come into it (see
:func:`shared.adapters.structure.setting`); fresh values are PEFT's plain ones, since the client's
take their place.
"""

from __future__ import annotations

import math
import traceback
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from shared.adapters.structure import (
    AdapterSpec,
    check_adapter_name,
    config_class,
    setting,
    tuner_class,
)
from shared.errors import AdapterError, SharedWeightsError, TrunklineError
from trunk_service.sealed import sealed

_BYTES = 8  # of a number, at most
_SHORT = 3  # names in a message
_LONGEST = 400  # characters of a message of PEFT's
_LARGE = 4096  # of what may be a number of layers, terms or rounds
_ANY_NUMBER = (
    *("seed", "key", "step", "init", "final", "deltaT", "warmup", "interval"),
    *("frequency", "length", "vectors", "alpha", "lambda"),
)
_MOST_OPERATIONS = 4000  # of a build, for each layer adapted
_COUNTS = ("n", "m", "end")  # arguments of what makes tensors of nothing


@dataclass(frozen=True)
class TreeLimits:
    """What one tenant's tree may hold."""

    max_adapters: int = 8
    max_rank: int = 256
    max_parameters: int = 100_000_000
    """Numbers of all adapters together."""


def check_specs(
    specs: Sequence[AdapterSpec], modules: Mapping[str, nn.Module], limits: TreeLimits
) -> list[PeftConfig]:
    """Makes PEFT's configurations of adapters, or refuses them before anything is built.

    Args:
        specs: As they came.
        modules: Those of the trunk's blocks, by full name.
        limits: What the tree may hold.

    Raises:
        AdapterError: Names what was given and what is accepted.
    """
    if len(specs) > limits.max_adapters:
        raise AdapterError(
            f"{len(specs)} adapters in one model; this trunk accepts up to {limits.max_adapters}"
        )
    for spec in specs:
        check_adapter_name(spec.name)
        tuner_class(spec.peft_type)
    if len({spec.name for spec in specs}) < len(specs):
        raise AdapterError("two adapters of one name are not accepted: each has its own")
    if len({spec.peft_type for spec in specs}) > 1:
        raise AdapterError(
            f"adapters of several PEFT methods in one model ({', '.join(_types(specs))}) are not "
            f"accepted: adapters of one method are"
        )
    configs = [_config(spec, modules, limits) for spec in specs]
    saved = [m for spec in specs for m in spec.modules_to_save]
    _check_count(sum(_size(modules[name]) for name in saved), limits)
    return configs


def add_adapters(
    model: Any, specs: Sequence[AdapterSpec], configs: Sequence[PeftConfig], limits: TreeLimits
) -> Any:
    """Lets PEFT put adapters into a module tree.

    Args:
        model: A tenant's own tree around shared tensors; unusable if this raises.
        specs: The adapters.
        configs: Of :func:`check_specs`.
        limits: What the tree may hold.

    Returns:
        PEFT's tuner; None without an adapter.

    Raises:
        AdapterError: If PEFT refuses it, or it is larger than the limits allow.
    """
    tuner: Any = None
    try:
        layers = sum(len(spec.target_modules) + len(spec.modules_to_save) for spec in specs)
        with sealed(), warnings.catch_warnings(), _Allowance(model, limits, layers):
            warnings.simplefilter("ignore")
            for spec, config in zip(specs, configs, strict=True):
                if tuner is None:
                    tuner = tuner_class(spec.peft_type)(model, config, spec.name)
                else:
                    tuner.peft_config[spec.name] = config
                    tuner.inject_adapter(model, spec.name)
                for path, rank in spec.ranks.items():
                    _resize(model.get_submodule(path), spec.name, rank, config)
    except Exception as error:
        refusal = _refusal(error, specs)
        # What PEFT had made so far would live as long as the frames that made it.
        traceback.clear_frames(error.__traceback__)
        discard(model)
        raise refusal from None
    return tuner


def _resize(layer: Any, adapter: str, rank: int, config: PeftConfig) -> None:
    """Gives a layer a rank that PEFT gave it after it had put the adapter there."""
    ranks = layer.__dict__.get("r")
    if isinstance(ranks, dict) and ranks.get(adapter) not in (None, rank):
        alphas = layer.__dict__.get("lora_alpha", {})
        layer.update_layer(adapter, rank, alphas.get(adapter), config=config)


def discard(model: nn.Module) -> None:
    """Empties a tree that is not used, whatever still refers to it."""
    for module in list(model.modules()):
        for name in list(module.__dict__):
            if name not in ("_parameters", "_buffers", "_modules") and not name.startswith("_"):
                del module.__dict__[name]
        module._parameters.clear()
        module._buffers.clear()
        module._modules.clear()


def _types(specs: Sequence[AdapterSpec]) -> list[str]:
    return sorted({spec.peft_type for spec in specs})


def _refusal(error: Exception, specs: Sequence[AdapterSpec]) -> TrunklineError:
    if isinstance(error, TrunklineError):
        return error.with_traceback(None)
    methods = ", ".join(_types(specs))
    why = f"{type(error).__name__}: {error}"[:_LONGEST]
    return AdapterError(f"PEFT cannot put this {methods} on the trunk's blocks: {why}")


def _config(spec: AdapterSpec, modules: Mapping[str, nn.Module], limits: TreeLimits) -> PeftConfig:
    made = config_class(spec.peft_type)
    fields = set(made.__dataclass_fields__)
    targets = _own(spec.target_modules, modules, "target_modules")
    given: dict[str, Any] = {"inference_mode": False}
    for name, value in spec.settings.items():
        given[name] = setting(made, name, value)
        _check_size_of(name, given[name], limits)
    given["target_modules"] = sorted(targets) or DUMMY_TARGET_MODULES
    given["modules_to_save"] = _own(spec.modules_to_save, modules, "modules_to_save") or None
    given["feedforward_modules"] = _own(spec.feedforward_modules, targets, "feedforward_modules")
    given["fan_in_fan_out"] = any(isinstance(modules[n], Conv1D) for n in targets)
    for rank in _own(spec.ranks, targets, "ranks"):
        _check_rank(rank, spec.ranks[rank], limits)
    for alpha in _own(spec.alphas, targets, "alphas"):
        _check_number(alpha, spec.alphas[alpha])
    given["rank_pattern"] = {name: spec.ranks[name] for name in spec.ranks}
    given["alpha_pattern"] = {name: spec.alphas[name] for name in spec.alphas}
    for name in ("rank_pattern", "alpha_pattern", "feedforward_modules", "fan_in_fan_out"):
        if name not in fields:
            _check_unused(spec, name, given.pop(name))
    try:
        with sealed():
            return made(**given)
    except Exception as error:
        raise AdapterError(f"PEFT refuses this {spec.peft_type}: {error}"[:_LONGEST]) from None


def _check_unused(spec: AdapterSpec, name: str, value: Any) -> None:
    if value and name != "fan_in_fan_out":
        raise AdapterError(f"{spec.peft_type} has no {name}: accepted are fields that it has")


def _own(given: Any, known: Any, what: str) -> list[str]:
    """Names, as objects of our own, of modules that are there."""
    own = {name: name for name in known}
    foreign = [str(name)[:80] for name in given if not isinstance(name, str) or name not in own]
    if foreign:
        raise AdapterError(
            f"{what} {foreign[:_SHORT]} are not accepted: full names of modules of the trunk's "
            f"blocks are"
        )
    return [own[name] for name in given]


def _check_size_of(name: str, value: object, limits: TreeLimits) -> None:
    if "rank" in name or name.rsplit("_", 1)[-1] == "r":
        _check_rank(name, value, limits)
    elif isinstance(value, int) and abs(value) > _LARGE and not any(w in name for w in _ANY_NUMBER):
        raise AdapterError(
            f"{name}={value:.6g} is not accepted: this trunk accepts numbers up to {_LARGE}"
        )


def _check_rank(name: str, rank: object, limits: TreeLimits) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int | float) or not rank <= limits.max_rank:
        shown = f"{rank:.6g}" if isinstance(rank, int | float) else repr(rank)[:40]
        raise AdapterError(
            f"adapter rank {name}={shown}; this trunk accepts numbers up to {limits.max_rank}"
        )


def _check_number(name: str, number: object) -> None:
    if isinstance(number, bool) or not isinstance(number, int | float) or not abs(number) < 2**31:
        raise AdapterError(f"alpha of {name} is not accepted: a finite number below 2**31 is")


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _check_count(count: int, limits: TreeLimits) -> None:
    if count > limits.max_parameters:
        raise AdapterError(
            f"adapter of {count} parameters; this trunk accepts up to {limits.max_parameters}"
        )


class _Allowance(TorchDispatchMode):
    """Bounds what PEFT allocates while it builds; keeps base weights and torch's generator.

    Args:
        model: The tree that is built in; what it refers to now is shared.
        limits: What it may hold.
        layers: How many are adapted.
    """

    def __init__(self, model: nn.Module, limits: TreeLimits, layers: int) -> None:
        super().__init__()
        self._model, self._limits = model, limits
        shared = [t for t in _tensors(model) if t.numel()]
        self._shared = {t.untyped_storage().data_ptr() for t in shared}
        largest = max((t.numel() for t in shared), default=0)
        # Decompositions of a base matrix need several of its size, for a moment.
        self._allowed = _BYTES * max(limits.max_parameters, 2 * largest)
        self._made = 0
        self._operations = _MOST_OPERATIONS * (1 + layers)
        self._generators: dict[torch.device, torch.Generator] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Checks one operation and computes it."""
        kwargs = kwargs or {}
        given = {a.name: v for a, v in zip(func._schema.arguments, args, strict=False)} | kwargs
        for argument in func._schema.arguments:
            value = given.get(argument.name)
            writes = argument.alias_info is not None and argument.alias_info.is_write
            if writes and isinstance(value, torch.Tensor) and self._is_shared(value):
                raise SharedWeightsError(
                    "this adapter would write into the trunk's base weights, which its tenants "
                    "share: accepted are adapters whose own tensors hold what is trained"
                )
        self._check(_BYTES * _asked(func, given))
        self._operations -= 1
        if self._operations < 0:
            raise AdapterError("an adapter that takes this long to build is not accepted")
        func, kwargs = self._seeded(func, given, kwargs)
        made = func(*args, **kwargs)
        if isinstance(made, torch.Tensor) and not func.is_view:
            self._made += made.nbytes
            self._check(made.nbytes)
            if self._made > self._allowed // 4:
                self._made = 0
                self._check(self._held())
        return made

    def _is_shared(self, tensor: torch.Tensor) -> bool:
        return tensor.numel() > 0 and tensor.untyped_storage().data_ptr() in self._shared

    def _held(self) -> int:
        """Bytes of the tree that are not shared."""
        found = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in _tensors(self._model)}
        return sum(s.nbytes() for pointer, s in found.items() if pointer not in self._shared)

    def _check(self, count: int) -> None:
        if count > self._allowed:
            raise AdapterError(
                f"an adapter that needs {count} bytes to be built; this trunk accepts up to "
                f"{self._limits.max_parameters} parameters"
            )

    def _seeded(self, func: Any, given: dict[str, Any], kwargs: dict[str, Any]) -> Any:
        """Draws from a generator of our own: other tenants' forwards may be using torch's."""
        if torch.Tag.nondeterministic_seeded not in func.tags or given.get("generator") is not None:
            return func, kwargs
        names = {argument.name for argument in func._schema.arguments}
        if "generator" not in names:
            overload = func._overloadname.replace("default", "")
            func = getattr(func.overloadpacket, f"{overload}_generator".lstrip("_"), func)
            names = {argument.name for argument in func._schema.arguments}
        if "generator" not in names:
            return func, kwargs
        tensor = next((v for v in given.values() if isinstance(v, torch.Tensor)), None)
        device = tensor.device if tensor is not None else kwargs.get("device") or "cpu"
        return func, kwargs | {"generator": self._generator(torch.device(device))}

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(0)
        return self._generators[device]


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


def _asked(func: Any, given: dict[str, Any]) -> int:
    """How many numbers an operation would make, where its arguments say so."""
    tensor = next((v for v in given.values() if isinstance(v, torch.Tensor)), None)
    sizes = [1 if tensor is None or "repeats" not in given else tensor.numel()]
    for argument in func._schema.arguments:
        value = given.get(argument.name)
        if argument.name in ("size", "repeats") and isinstance(value, list | tuple):
            sizes.append(math.prod(abs(int(n)) for n in value))
        elif argument.name in _COUNTS and tensor is None and isinstance(value, int | float):
            sizes.append(abs(int(value)))
    return math.prod(sizes)
