"""The dtypes and formats of the wire and ours, one table each, both ways."""

from __future__ import annotations

import torch

from shared.errors import TensorError
from shared.pb.trunkline.v1 import trunk_pb2 as pb
from shared.wire.formats import WireFormat

TORCH_DTYPES: dict[int, torch.dtype] = {
    pb.DATA_TYPE_FLOAT32: torch.float32,
    pb.DATA_TYPE_FLOAT16: torch.float16,
    pb.DATA_TYPE_BFLOAT16: torch.bfloat16,
    pb.DATA_TYPE_FLOAT64: torch.float64,
    pb.DATA_TYPE_INT64: torch.int64,
    pb.DATA_TYPE_INT32: torch.int32,
    pb.DATA_TYPE_INT8: torch.int8,
    pb.DATA_TYPE_UINT8: torch.uint8,
    pb.DATA_TYPE_BOOL: torch.bool,
}

_FORMATS: dict[int, WireFormat] = {
    pb.WIRE_FORMAT_FLOAT32: WireFormat.FLOAT32,
    pb.WIRE_FORMAT_BFLOAT16: WireFormat.BFLOAT16,
    pb.WIRE_FORMAT_FLOAT16: WireFormat.FLOAT16,
    pb.WIRE_FORMAT_FLOAT64: WireFormat.FLOAT64,
    pb.WIRE_FORMAT_INT8: WireFormat.INT8,
}

_FORMAT_VALUES = {wire_format: value for value, wire_format in _FORMATS.items()}

_WIRE_DTYPES = {dtype: value for value, dtype in TORCH_DTYPES.items()}


def to_torch(data_type: int) -> torch.dtype:
    """Returns torch's dtype of a wire ``DataType``.

    Raises:
        TensorError: If the value is none of the enumeration.
    """
    if data_type not in TORCH_DTYPES:
        raise TensorError(f"data type {data_type} is unknown; accepted: {sorted(TORCH_DTYPES)}")
    return TORCH_DTYPES[data_type]


def to_wire(dtype: torch.dtype) -> pb.DataType.ValueType:
    """Returns the wire ``DataType`` of torch's dtype.

    Raises:
        TensorError: If the dtype does not travel.
    """
    if dtype not in _WIRE_DTYPES:
        raise TensorError(f"{dtype} does not travel; accepted: {', '.join(map(str, _WIRE_DTYPES))}")
    return pb.DataType.ValueType(_WIRE_DTYPES[dtype])


def to_format(value: int) -> WireFormat:
    """Returns what a wire ``WireFormat`` means; the unspecified one is float32.

    Raises:
        TensorError: If the value is none of the enumeration.
    """
    if value == pb.WIRE_FORMAT_UNSPECIFIED:
        return WireFormat.FLOAT32
    if value not in _FORMATS:
        raise TensorError(f"wire format {value} is unknown; accepted: {sorted(_FORMATS)}")
    return _FORMATS[value]


def from_format(wire_format: WireFormat) -> pb.WireFormat.ValueType:
    """Returns the wire ``WireFormat`` of ours."""
    return pb.WireFormat.ValueType(_FORMAT_VALUES[wire_format])
