"""One protobuf message as bytes, with its ``data`` field kept out of protobuf's hands.

Protobuf's own serializer copies a bytes field into its message object, then into the output, and
its parser copies it out again. Here the few small fields go through protobuf, and the tag, length
and bytes of ``data`` are joined behind them once. The reader walks the top-level tags and takes a
view of ``data``. What is on the wire is exactly what protobuf itself would write and can read.
"""

from __future__ import annotations

from typing import Generic, TypeVar

from google.protobuf.message import DecodeError, Message

from shared.errors import ProtocolError

DATA_FIELD = 15  # `bytes data` in SessionRequest and SessionResponse
_DATA_TAG = bytes([DATA_FIELD << 3 | 2])
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5

M = TypeVar("M", bound=Message)


class Frame(Generic[M]):
    """A message whose ``data`` is apart: its small fields, and a view of the payload bytes."""

    __slots__ = ("message", "payload")

    def __init__(self, message: M, payload: memoryview) -> None:
        self.message = message
        self.payload = payload


def encode_frame(message: Message, *payload: bytes | memoryview) -> bytes:
    """Serializes a message with bytes, back to back, as its ``data`` field; they are copied once.

    Args:
        message: Its small fields.
        *payload: Bytes, or views of them.
    """
    views = [memoryview(part) for part in payload]
    size = sum(view.nbytes for view in views)
    if not size:
        return message.SerializeToString()
    head = message.SerializeToString() + _DATA_TAG + _varint(size)
    return b"".join((head, *views))


def decode_frame(message_type: type[M], raw: bytes) -> Frame[M]:
    """Parses a message, leaving ``data`` as a view into ``raw``.

    Raises:
        ProtocolError: If ``raw`` is no such message.
    """
    view = memoryview(raw)
    try:
        small, payload = _take_data(view)
        return Frame(message_type.FromString(small), payload)
    except (DecodeError, IndexError, ValueError) as error:
        name = message_type.DESCRIPTOR.name
        raise ProtocolError(f"{len(raw)} bytes are not a {name} message ({error})") from error


def _take_data(view: memoryview) -> tuple[bytes, memoryview]:
    """Splits top-level fields into the last ``data`` field and all the others."""
    kept: list[memoryview] = []
    payload = view[:0]
    position = 0
    while position < len(view):
        start = position
        key, position = _read_varint(view, position)
        field, wire_type = key >> 3, key & 7
        body, position = _field_end(view, position, wire_type)
        if field == DATA_FIELD and wire_type == _LENGTH:
            payload = view[body:position]
        else:
            kept.append(view[start:position])
    return b"".join(kept), payload


def _field_end(view: memoryview, position: int, wire_type: int) -> tuple[int, int]:
    """Returns where a field's value begins and ends."""
    if wire_type == _LENGTH:
        length, position = _read_varint(view, position)
        end = position + length
    elif wire_type == _VARINT:
        _, end = _read_varint(view, position)
    elif wire_type in (_FIXED64, _FIXED32):
        end = position + (8 if wire_type == _FIXED64 else 4)
    else:
        raise ValueError(f"wire type {wire_type}")
    if end > len(view):
        raise ValueError("a field reaches past the end")
    return position, end


def _read_varint(view: memoryview, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = view[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("a varint of more than ten bytes")


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
