"""What a client tells a trunk of its adapters: plain data, no pattern, file name or configuration.

The client's PEFT model is the truth. Its part in the trunk's blocks is described by names of the
blocks' own modules, numbers, booleans and words that PEFT enumerates; the trunk builds the same
module tree from that (:mod:`trunk_service.tenant_tree`), with the plain initialisation, and is then
given the values of all tensors. What PEFT's layers keep outside parameters and buffers is never
sent: both sides compute its digest, and the two must agree.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from shared.errors import AdapterError
from shared.tensor_bytes import as_bytes

Setting = bool | int | float | str

DRAWS_IN_FORWARD = frozenset({"PVERA", "POLY"})
"""Methods whose forward draws random numbers of its own, beside dropout."""

FROM_THE_TREE = frozenset(
    {
        "target_modules",
        "exclude_modules",
        "feedforward_modules",
        "modules_to_save",
        "layers_to_transform",
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
        "trainable_token_indices",
    }
)
"""Fields that say where PEFT puts what: names of the modules where it did are sent instead."""

NOT_SENT = FROM_THE_TREE | {
    "peft_type",
    "task_type",
    "inference_mode",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "runtime_config",
    "fan_in_fan_out",
    "bias",
    "ensure_weight_tying",
    "megatron_core",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
}
"""Besides those: what says where an adapter came from, how it began, or which of its tensors are
trained (every value says that itself), and what the trunk's own layers decide."""

LARGEST_NUMBER = 2**31
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}")
_KEPT = ("builtins", "torch", "peft")
_CONTAINERS = (nn.ModuleDict(), nn.ParameterDict())
_DEEPEST = 3


@dataclass(frozen=True)
class AdapterSpec:
    """One adapter, as far as it lives in the trunk's blocks. Modules are named in full."""

    name: str
    peft_type: str
    """As PEFT writes it."""
    target_modules: tuple[str, ...]
    feedforward_modules: tuple[str, ...] = ()
    """Those of them that a method treats as feed-forward layers."""
    modules_to_save: tuple[str, ...] = ()
    ranks: dict[str, int] = field(default_factory=dict)
    """By module, where it is not that of the settings."""
    alphas: dict[str, float] = field(default_factory=dict)
    """By module, where it is not that of the settings."""
    settings: dict[str, Setting] = field(default_factory=dict)
    """Fields of PEFT's configuration that are not its defaults; see :func:`setting`."""


@dataclass(frozen=True)
class LayerState:
    """What PEFT, or a user, keeps in plain attributes of one layer."""

    module: str
    active: tuple[str, ...] = ()
    """Adapters switched on, in order."""
    disabled: bool = False
    scaling: dict[str, float] = field(default_factory=dict)
    """By adapter."""
    dropout: float | None = None
    """Probability, of layers that have one; of a tuner's, the largest of its own."""
    outside: dict[str, str] = field(default_factory=dict)
    """Digests of what a tuner's layer keeps outside parameters and buffers; see :func:`outside`."""


@dataclass(frozen=True)
class Structure:
    """All adapters in the trunk's blocks, and the state of their layers."""

    adapters: tuple[AdapterSpec, ...] = ()
    layers: tuple[LayerState, ...] = ()


@dataclass(frozen=True)
class Value:
    """What is said of one tensor whose numbers are sent."""

    names: tuple[str, ...]
    """Every place where it stands, as of :func:`base_name`; what layers share has several."""
    requires_grad: bool = False
    is_buffer: bool = False
    """Whether it stands among the buffers, not the parameters."""


def puts_layers(peft_type: str) -> bool:
    """Tells whether a method of PEFT puts layers of its own into a model."""
    known = isinstance(peft_type, str) and peft_type in {kind.value for kind in PeftType}
    found = PEFT_TYPE_TO_TUNER_MAPPING.get(PeftType(peft_type)) if known else None
    return found is not None and issubclass(found, BaseTuner)


def tuner_class(peft_type: str) -> Any:
    """PEFT's class that puts a method's layers into a model.

    Raises:
        AdapterError: If PEFT has no such method, it is none of layers, or it draws in its forward.
    """
    if not puts_layers(peft_type):
        raise AdapterError(
            f"PEFT method {_shown(peft_type)} on the trunk's blocks is not accepted: accepted are "
            f"PEFT's methods that put layers of their own into a model"
        )
    if peft_type in DRAWS_IN_FORWARD:
        raise AdapterError(
            f"PEFT method {peft_type} on the trunk's blocks is not accepted: its layers draw their "
            f"own random numbers in forward, which would not be those of the whole model"
        )
    return PEFT_TYPE_TO_TUNER_MAPPING[PeftType(peft_type)]


def config_class(peft_type: str) -> type[PeftConfig]:
    """PEFT's configuration of a method that :func:`tuner_class` knows."""
    found: type[PeftConfig] = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(peft_type)]
    return found


def setting(config: type[PeftConfig], name: str, value: object) -> Any:
    """What PEFT may be given for a field of a configuration, from what travelled.

    Only booleans and numbers of the kind that the field's annotation admits, and words that it
    enumerates; never an initialisation other than PEFT's plain one.

    Args:
        config: PEFT's class.
        name: Of the field.
        value: What came.

    Returns:
        The same; a word of an enumeration as its member.

    Raises:
        AdapterError: Names the field, what was given and what is accepted.
    """
    kinds = _kinds(config, name)
    if (
        kinds
        and name not in NOT_SENT
        and not (is_beginning(name) and isinstance(value, bool | str))
    ):
        if type(value) in (bool, int, float) and _is_number_of(value, kinds):
            return value
        if isinstance(value, str) and value in (words := _words(kinds)):
            return words[value]
    raise AdapterError(
        f"{config.__name__} with {name}={_shown(value)} is not accepted on the trunk's blocks: "
        f"accepted are {_accepted(name, kinds)}"
    )


def check_adapter_name(name: object) -> None:
    """Refuses names that no attribute of a module can have.

    Raises:
        AdapterError: Says what was given and what is accepted.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or _is_taken(name):
        raise AdapterError(
            f"adapter name {_shown(name)} is not accepted: up to 64 letters, digits, _ and - are, "
            f"without two underscores at the beginning and other than a name that torch uses"
        )


def base_name(name: str) -> str:
    """The name that a tensor of the blocks has without PEFT's layers around its own.

    A layer stays wrapped where its adapter was deleted; the trunk builds what there is.
    """
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")


def scaling_of(layer: nn.Module) -> dict[str, float]:
    """What a tuner's layer multiplies each adapter with, where it says that in plain numbers."""
    found = layer.__dict__.get("scaling")
    if not isinstance(found, dict):
        return {}
    return {name: float(value) for name, value in found.items() if isinstance(value, int | float)}


def dropout_of(module: nn.Module) -> float | None:
    """A module's own dropout probability: of a dropout layer, or of an attention's."""
    if isinstance(module, nn.Dropout) or "Dropout" in type(module).__name__:
        found = getattr(module, "p", None)
    else:
        found = module.__dict__.get("attention_dropout")
    return float(found) if isinstance(found, int | float) else None


def set_dropout_of(module: nn.Module, probability: float) -> None:
    """Sets what :func:`dropout_of` reads."""
    name = "attention_dropout" if "attention_dropout" in module.__dict__ else "p"
    setattr(module, name, probability)


def own_dropout(layer: nn.Module) -> float | None:
    """The largest dropout probability that a tuner's layer keeps for its adapters by itself."""
    kept = [v for name, v in layer.__dict__.items() if "dropout" in name and isinstance(v, dict)]
    numbers = [n for each in kept for n in each.values() if isinstance(n, int | float)]
    return float(max(numbers)) if numbers else None


def draws(structure: Structure) -> bool:
    """Tells whether a forward in training mode draws random numbers."""
    return any(layer.dropout for layer in structure.layers)


def outside(layer: nn.Module, adapters: frozenset[str], skip: typing.Callable[..., bool]) -> Any:
    """Digests of what a tuner's layer computes with and torch does not see.

    Tensors in plain attributes, in containers and in modules hidden in them; and the numbers and
    words that it keeps for each adapter.

    Args:
        layer: Of a tuner.
        adapters: Names of all adapters in the tree.
        skip: Tells of a tensor whether it is one of the base weights.

    Returns:
        Digests by attribute, ``dict[str, str]``.
    """
    found: dict[str, str] = {}
    for name, value in layer.__dict__.items():
        if name in ("_parameters", "_buffers", "_modules", "scaling"):
            continue
        for path, tensor in _tensors(name, value):
            if not skip(tensor):
                found[path] = digest(tensor)
        if isinstance(value, dict):
            for key in adapters & value.keys():
                if isinstance(value[key], bool | int | float):
                    found[f"{name}.{key}"] = repr(float(value[key]))
                elif isinstance(value[key], str):
                    found[f"{name}.{key}"] = repr(value[key])
                elif type(value[key]).__module__.split(".")[0] not in _KEPT:  # of who calls
                    found[f"{name}.{key}"] = _class_of(value[key])
    # Layers inside that have no tensors, such as a dropout that somebody has replaced.
    inside = {
        path: _class_of(module)
        for path, module in layer.named_modules()
        if path and not f"{path}.".startswith("base_layer.")
    }
    found["modules"] = hashlib.sha256(repr(sorted(inside.items())).encode()).hexdigest()
    return found


def _class_of(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


_known: Any = WeakTensorKeyDictionary()


def digest(tensor: torch.Tensor) -> str:
    """SHA-256 over shape, dtype and numbers; remembered while the tensor is not written."""
    state = (tensor._version, tensor.data_ptr())
    if (known := _known.get(tensor)) is not None and known[0] == state:
        return str(known[1])
    found = hashlib.sha256(f"{tensor.dtype}:{tuple(tensor.shape)}".encode())
    found.update(as_bytes(tensor.detach().cpu().contiguous()))
    _known[tensor] = state, found.hexdigest()
    return found.hexdigest()


def _tensors(name: str, value: object, depth: int = 0) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, nn.Module):
        value = dict(value.named_buffers()) | dict(value.named_parameters())
    if isinstance(value, torch.Tensor):
        yield name, value
    elif depth < _DEEPEST and isinstance(value, Mapping | list | tuple):
        inner = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, more in inner:
            yield from _tensors(f"{name}.{key}", more, depth + 1)


def _kinds(config: type[PeftConfig], name: str) -> list[Any]:
    """The alternatives of a field's annotation; none if it has no such field."""
    fields = {f.name for f in dataclasses.fields(config) if f.init}
    return _alternatives(_hints(config)[name]) if name in fields else []


_hints_known: dict[type, dict[str, Any]] = {}


def _hints(config: type[PeftConfig]) -> dict[str, Any]:
    if config not in _hints_known:
        _hints_known[config] = typing.get_type_hints(config)
    return _hints_known[config]


def _alternatives(hint: Any) -> list[Any]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [kind for inner in typing.get_args(hint) for kind in _alternatives(inner)]
    return [hint]


def _words(kinds: list[Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind in kinds:
        if typing.get_origin(kind) is Literal:
            found |= {word: word for word in typing.get_args(kind) if isinstance(word, str)}
        elif isinstance(kind, type) and issubclass(kind, enum.Enum):
            found |= {str(member.value): member for member in kind}
    return found


def _is_number_of(value: Any, kinds: list[Any]) -> bool:
    if isinstance(value, bool):
        return bool in kinds
    fits = float in kinds or (int in kinds and isinstance(value, int))
    return fits and abs(value) <= LARGEST_NUMBER


def is_beginning(name: str) -> bool:
    """Whether a field is about an adapter's fresh values."""
    return "init" in name.split("_")


def _is_taken(name: str) -> bool:
    return name.startswith("__") or any(hasattr(container, name) for container in _CONTAINERS)


def _accepted(name: str, kinds: list[Any]) -> str:
    if name in NOT_SENT or not kinds:
        return "fields of its own that are numbers, booleans or enumerated words"
    plain = [kind.__name__ for kind in kinds if kind in (bool, int, float)]
    words = [repr(word) for word in _words(kinds)]
    if is_beginning(name):
        plain, words = [kind for kind in plain if kind != "bool"], []
    return ", ".join([*plain, *words]) or "its default alone"


def _shown(value: object) -> str:
    text = repr(value) if not isinstance(value, int) else f"{value:.6g}"
    return text if len(text) <= 80 else f"{text[:77]}..."
