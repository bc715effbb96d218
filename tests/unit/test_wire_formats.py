"""Wire formats: what arrives, how far off it is, how many bytes it takes."""

from __future__ import annotations

import pytest
import torch

from shared.errors import InvalidInputError
from shared.pb.trunkline.v1 import trunk_pb2 as pb
from shared.wire.dtypes import from_format, to_format
from shared.wire.formats import BLOCK, Int8Blocks, Packed, WireFormat, block_bytes, pack, unpack
from shared.wire.messages import Inbox, to_frames

pytestmark = pytest.mark.numeric


def blocks(tensor: torch.Tensor) -> Int8Blocks:
    packed = pack(tensor, WireFormat.INT8)
    assert isinstance(packed, Int8Blocks)
    return packed


def through_the_wire(sent: dict[str, Packed]) -> dict[str, torch.Tensor]:
    inbox = Inbox(pb.SessionRequest, lambda _: 1 << 30, 1 << 30)
    frames = list(to_frames(pb.SessionRequest(id=1, forward=pb.Forward()), sent))
    [whole] = [m for m in map(inbox.feed, frames) if m is not None]
    assert whole.error is None
    return whole.tensors


@pytest.mark.parametrize("shape", [(2, 3, 64), (5, 7), (1,), (0, 4), (3, 1_000_003)])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_int8_blocks_are_off_by_half_a_level(shape: tuple[int, ...], scale: float) -> None:
    torch.manual_seed(0)
    tensor = torch.randn(shape) * scale
    packed = blocks(tensor)
    assert packed.nbytes == block_bytes(tensor.numel())
    found = through_the_wire({"a": packed, "b": torch.arange(3)})
    assert torch.equal(found["b"], torch.arange(3))
    assert found["a"].shape == tensor.shape and found["a"].dtype == torch.float32
    flat, back = tensor.flatten(), found["a"].flatten()
    for start in range(0, min(len(flat), 50 * BLOCK), BLOCK):
        block, restored = flat[start : start + BLOCK], back[start : start + BLOCK]
        half_a_level = float(block.abs().max()) / 127 / 2  # and bfloat16's rounding of the scale
        assert float((block - restored).abs().max()) <= half_a_level * 1.005


def test_a_block_does_not_feel_its_neighbours() -> None:
    tensor = torch.ones(2 * BLOCK)
    tensor[0] = 1e6
    packed = blocks(tensor)
    assert torch.allclose(unpack(packed.raw, packed.shape)[BLOCK:], torch.ones(1), rtol=5e-3)


def test_rounding_errors_of_a_gradient_cancel_along_the_tokens() -> None:
    torch.manual_seed(0)
    gradient_BTD = torch.randn(2, 200, 128) * 1e-6
    gradient_BTD[:, 50:60] = 0.0
    plain, fed_back = blocks(gradient_BTD), pack(gradient_BTD, WireFormat.INT8, is_gradient=True)
    assert isinstance(fed_back, Int8Blocks) and fed_back.nbytes == plain.nbytes
    errors = [unpack(p.raw, p.shape) - gradient_BTD for p in (plain, fed_back)]
    sums = [float(error.sum(dim=1).abs().mean()) for error in errors]
    assert sums[1] < sums[0] / 5, "a sum over tokens is no better for the feedback"
    assert float(errors[1].abs().max()) < 2 * float(errors[0].abs().max())
    whole = fed_back.raw.tolist()
    again = pack(gradient_BTD, WireFormat.INT8, is_gradient=True)
    assert isinstance(again, Int8Blocks) and again.raw.tolist() == whole


def test_a_gradient_of_another_shape_is_rounded_plainly() -> None:
    gradient = torch.randn(3, 4, 65)
    fed_back = pack(gradient, WireFormat.INT8, is_gradient=True)
    assert isinstance(fed_back, Int8Blocks)
    assert torch.equal(fed_back.raw, blocks(gradient).raw)


def test_zeros_stay_zeros_and_what_is_not_finite_stays_so() -> None:
    packed = blocks(torch.zeros(100))
    assert torch.equal(unpack(packed.raw, packed.shape), torch.zeros(100))
    for bad in (float("nan"), float("inf")):
        packed = blocks(torch.tensor([1.0, bad]))
        assert not unpack(packed.raw, packed.shape).isfinite().all()


@pytest.mark.parametrize("wire_format", [f for f in WireFormat if f is not WireFormat.INT8])
def test_plain_formats_are_their_dtype(wire_format: WireFormat) -> None:
    tensor = torch.randn(3, 5)
    dtype = getattr(torch, wire_format.value)
    assert torch.equal(through_the_wire({"a": pack(tensor, wire_format)})["a"], tensor.to(dtype))


def test_names_and_numbers_of_formats_go_both_ways() -> None:
    for wire_format in WireFormat:
        assert to_format(from_format(wire_format)) is wire_format
        assert WireFormat.named(wire_format.value) is wire_format
    assert to_format(0) is WireFormat.FLOAT32
    with pytest.raises(InvalidInputError, match="accepted: float32, bfloat16"):
        WireFormat.named("int4")
