"""Between the description of a client's adapters and its messages."""

from __future__ import annotations

from collections.abc import Iterable

from shared.adapters.structure import AdapterSpec, LayerState, Setting, Structure, Value
from shared.errors import ProtocolError
from shared.pb.trunkline.v1 import trunk_pb2 as pb


def write_structure(structure: Structure) -> pb.Structure:
    """Writes all adapters of a client and the state of their layers."""
    return pb.Structure(
        adapters=[_write_adapter(adapter) for adapter in structure.adapters],
        layers=[
            pb.LayerState(
                module=layer.module,
                active=layer.active,
                disabled=layer.disabled,
                scaling=layer.scaling,
                dropout=layer.dropout,
                outside=layer.outside,
            )
            for layer in structure.layers
        ],
    )


def read_structure(message: pb.Structure) -> Structure:
    """Reads it.

    Raises:
        ProtocolError: If a setting says nothing.
    """
    return Structure(
        adapters=tuple(_read_adapter(adapter) for adapter in message.adapters),
        layers=tuple(
            LayerState(
                module=layer.module,
                active=tuple(layer.active),
                disabled=layer.disabled,
                scaling=dict(layer.scaling),
                dropout=layer.dropout if layer.HasField("dropout") else None,
                outside=dict(layer.outside),
            )
            for layer in message.layers
        ),
    )


def write_values(values: Iterable[Value]) -> list[pb.Value]:
    """Writes what is said of tensors that are sent."""
    return [
        pb.Value(names=v.names, requires_grad=v.requires_grad, is_buffer=v.is_buffer)
        for v in values
    ]


def read_values(messages: Iterable[pb.Value]) -> tuple[Value, ...]:
    """Reads it.

    Raises:
        ProtocolError: If a tensor has no name.
    """
    values = tuple(Value(tuple(m.names), m.requires_grad, m.is_buffer) for m in messages)
    if any(not value.names for value in values):
        raise ProtocolError("a value without a name")
    return values


def _write_adapter(adapter: AdapterSpec) -> pb.AdapterSpec:
    return pb.AdapterSpec(
        name=adapter.name,
        peft_type=adapter.peft_type,
        target_modules=adapter.target_modules,
        feedforward_modules=adapter.feedforward_modules,
        modules_to_save=adapter.modules_to_save,
        ranks=adapter.ranks,
        alphas=adapter.alphas,
        settings={name: _write_setting(value) for name, value in adapter.settings.items()},
    )


def _read_adapter(message: pb.AdapterSpec) -> AdapterSpec:
    return AdapterSpec(
        name=message.name,
        peft_type=message.peft_type,
        target_modules=tuple(message.target_modules),
        feedforward_modules=tuple(message.feedforward_modules),
        modules_to_save=tuple(message.modules_to_save),
        ranks=dict(message.ranks),
        alphas=dict(message.alphas),
        settings={name: _read_setting(name, value) for name, value in message.settings.items()},
    )


def _write_setting(value: Setting) -> pb.Setting:
    if isinstance(value, bool):
        return pb.Setting(flag=value)
    if isinstance(value, int):
        return pb.Setting(integer=value)
    return pb.Setting(real=value) if isinstance(value, float) else pb.Setting(word=value)


def _read_setting(name: str, message: pb.Setting) -> Setting:
    match message.WhichOneof("kind"):
        case "flag":
            return message.flag
        case "integer":
            return message.integer
        case "real":
            return message.real
        case "word":
            return message.word
    raise ProtocolError(f"the setting {name!r} says nothing")
