"""What hidden states and gradients look like on the wire: plain dtypes, and int8 in blocks.

Int8 takes a quarter of float32's bytes. Every block of 64 numbers shares one scale, its largest
magnitude divided by 127 (Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2022; with
rounding to the nearest of evenly spaced levels). Scales are bfloat16, which has float32's range:
gradients are often smaller than float16 can tell from zero.

Gradients are rounded with error feedback along the tokens: what rounding took from one token is
added to the next before that is rounded, as in error diffusion (Floyd and Steinberg, 1976). An
adapter's gradient is a sum over tokens, in which such errors mostly cancel: it was measured to be
off by 0.24 % instead of 0.43 %. Feedback from batch to batch (1-bit SGD, Seide et al., 2014) made
it 0.61 %, since the error of one text is no use to another; and it would be state that a lost trunk
loses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import torch

from shared.errors import InvalidInputError

BLOCK = 64
_SCALE_BYTES = 2
_LEVELS = 127.0


class WireFormat(Enum):
    """How a tensor of floating-point numbers travels."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT64 = "float64"
    INT8 = "int8"

    @classmethod
    def named(cls, name: str) -> WireFormat:
        """The format of a name.

        Raises:
            InvalidInputError: If there is none; names all.
        """
        if name not in [f.value for f in cls]:
            accepted = ", ".join(f.value for f in cls)
            raise InvalidInputError(f"wire format {name!r} is unknown; accepted: {accepted}")
        return cls(name)


_DTYPES = {
    WireFormat.FLOAT32: torch.float32,
    WireFormat.BFLOAT16: torch.bfloat16,
    WireFormat.FLOAT16: torch.float16,
    WireFormat.FLOAT64: torch.float64,
}


@dataclass(frozen=True)
class Int8Blocks:
    """A float32 tensor as int8 numbers and the scales of their blocks."""

    raw: torch.Tensor
    """uint8: the scales of all blocks, then the numbers."""
    shape: torch.Size

    @property
    def nbytes(self) -> int:
        """Bytes on the wire."""
        return self.raw.nbytes


Packed = torch.Tensor | Int8Blocks


def pack_value(
    tensor: torch.Tensor,
    wire_format: WireFormat,
    to_host: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.cpu,
) -> Packed:
    """Converts an adapter's tensor, or its gradient, to what travels: as it is, unless float32.

    Args:
        tensor: Any, on any device.
        wire_format: How.
        to_host: Brings a tensor to the CPU.

    Returns:
        As :func:`pack`.
    """
    if wire_format is WireFormat.FLOAT32 or tensor.dtype != torch.float32:
        return to_host(tensor)
    return pack(tensor, wire_format, to_host=to_host)


def pack(
    tensor: torch.Tensor,
    wire_format: WireFormat,
    is_gradient: bool = False,
    to_host: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.cpu,
) -> Packed:
    """Converts a tensor to what travels.

    Args:
        tensor: Floating-point numbers of any shape, on any device.
        wire_format: How.
        is_gradient: Of hidden states, [B, T, D]: blocks are rounded with error feedback.
        to_host: Brings a tensor to the CPU.

    Returns:
        A tensor on the CPU (the given one where nothing is to be converted), or blocks.
    """
    if wire_format is not WireFormat.INT8:
        return to_host(tensor.detach().to(_DTYPES[wire_format]))
    values = tensor.detach().to(torch.float32)
    blocks = _in_blocks(values.reshape(-1))
    scales = (blocks.abs().amax(dim=1) / _LEVELS).to(torch.bfloat16)
    # A block of zeros stays one; what is not finite makes its scale so, and the other side sees it.
    inverse = torch.where(scales == 0, 0.0, 1.0 / scales.to(torch.float32))
    if is_gradient and tensor.ndim == 3 and tensor.shape[2] % BLOCK == 0:
        numbers = _round_along_tokens(values, scales, inverse)
    else:
        numbers = _levels(blocks * inverse[:, None])
    numbers = numbers.reshape(-1)[: values.numel()]
    raw = torch.cat([scales.view(torch.uint8), numbers.view(torch.uint8)])
    return Int8Blocks(to_host(raw), tensor.shape)


def block_bytes(count: int) -> int:
    """Bytes of so many numbers in blocks."""
    return count + _SCALE_BYTES * _blocks(count)


def unpack(raw: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Restores a float32 tensor of this shape from blocks."""
    count = shape.numel()
    scales_end = _SCALE_BYTES * _blocks(count)
    scales = raw[:scales_end].view(torch.bfloat16).to(torch.float32)
    numbers = _in_blocks(raw[scales_end:].view(torch.int8).to(torch.float32))
    return numbers.mul_(scales[:, None]).reshape(-1)[:count].reshape(shape)


def _levels(scaled: torch.Tensor) -> torch.Tensor:
    return scaled.round_().clamp_(-_LEVELS, _LEVELS).to(torch.int8)


def _round_along_tokens(
    values_BTD: torch.Tensor, scales: torch.Tensor, inverse: torch.Tensor
) -> torch.Tensor:
    batch, tokens, width = values_BTD.shape
    per_token = (batch, tokens, width // BLOCK, 1)
    values = values_BTD.reshape(batch, tokens, width // BLOCK, BLOCK)
    scales, inverse = scales.to(torch.float32).view(per_token), inverse.view(per_token)
    numbers = torch.empty(values.shape, dtype=torch.int8, device=values.device)
    error = torch.zeros_like(values[:, 0])
    for token in range(tokens):
        wanted = values[:, token] + error
        numbers[:, token] = _levels(wanted * inverse[:, token])
        error = wanted - numbers[:, token] * scales[:, token]
    return numbers


def _in_blocks(values: torch.Tensor) -> torch.Tensor:
    missing = -values.numel() % BLOCK
    if missing:
        values = torch.nn.functional.pad(values, (0, missing))
    return values.reshape(-1, BLOCK)


def _blocks(count: int) -> int:
    return -(-count // BLOCK)
