"""The codec against protobuf itself, and the inbox against interleaved and hostile frames."""

from __future__ import annotations

import contextlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared import errors
from shared.errors import ProtocolError, TensorError
from shared.pb.trunkline.v1 import trunk_pb2 as pb
from shared.wire.dtypes import TORCH_DTYPES
from shared.wire.error_codes import to_exception, to_message
from shared.wire.frames import decode_frame, encode_frame
from shared.wire.messages import Inbox, to_frames
from shared.wire.tensors import CHUNK_BYTES, MAX_FRAME_BYTES


@given(st.integers(0, 2**64 - 1), st.text(), st.binary(max_size=300))
def test_a_frame_is_what_protobuf_writes_and_reads(number: int, name: str, data: bytes) -> None:
    message = pb.SessionRequest(id=number, forward=pb.Forward(request_id=name))
    ours = encode_frame(message, data)
    assert pb.SessionRequest.FromString(ours).data == data
    message.data = data
    read = decode_frame(pb.SessionRequest, message.SerializeToString())
    assert (read.message.id, bytes(read.payload)) == (number, data)
    assert read.message.forward.request_id == name


@given(st.binary(max_size=200))
def test_garbage_is_a_protocol_error_or_a_message(raw: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        decode_frame(pb.SessionRequest, raw)


def inbox(limit: int = 1 << 30) -> Inbox[pb.SessionRequest]:
    return Inbox(pb.SessionRequest, lambda _: limit, max_open_bytes=2 * limit)


@pytest.mark.parametrize("dtype", TORCH_DTYPES.values(), ids=str)
def test_every_dtype_arrives_bit_for_bit(dtype: torch.dtype) -> None:
    sent = {"a": (torch.rand(3, 5) * 100).to(dtype), "none": torch.empty(0, 4, dtype=dtype)}
    frames = list(to_frames(pb.SessionRequest(id=1, forward=pb.Forward()), sent))
    incoming = inbox().feed(frames[0])
    assert incoming is not None and len(frames) == 1
    assert all(torch.equal(incoming.tensors[n], t) for n, t in sent.items())
    assert incoming.tensors["a"].data_ptr() % 64 == 0


def test_small_tensors_share_a_frame_and_no_frame_is_too_large() -> None:
    few = {"a": torch.randn(7, 3), "b": torch.ones(5, dtype=torch.bool), "c": torch.tensor([3])}
    assert len(list(to_frames(pb.SessionRequest(id=1, forward=pb.Forward()), few))) == 1
    # As an optimizer's state of many layers: the announcement alone is more than a megabyte.
    many = {f"optimizer/model.layers.{n}.{'lora' * 20}": torch.randn(256) for n in range(12_000)}
    frames = list(to_frames(pb.SessionRequest(id=1, forward=pb.Forward()), many))
    assert max(map(len, frames)) <= MAX_FRAME_BYTES
    box = inbox()
    found = [box.feed(frame) for frame in frames]
    assert found[:-1] == [None] * (len(frames) - 1)
    assert found[-1] is not None
    assert all(torch.equal(found[-1].tensors[n], t) for n, t in many.items())


def test_messages_in_chunks_may_interleave() -> None:
    sent = [torch.randn(CHUNK_BYTES // 4 * 2 + n) for n in (0, 1, 7)]
    streams = [
        list(to_frames(pb.SessionRequest(id=n + 1, forward=pb.Forward()), {"t": t}))
        for n, t in enumerate(sent)
    ]
    box, whole = inbox(), {}
    for position in range(max(map(len, streams))):
        for stream in streams:
            found = box.feed(stream[position]) if position < len(stream) else None
            if found is not None:
                whole[found.message.id] = found.tensors["t"]
    assert all(torch.equal(whole[n + 1], t) for n, t in enumerate(sent))


def test_a_refused_message_is_reported_once_and_the_stream_goes_on() -> None:
    box = inbox(limit=100)
    large = list(
        to_frames(pb.SessionRequest(id=1, forward=pb.Forward()), {"t": torch.zeros(CHUNK_BYTES)})
    )
    refused = box.feed(large[0])
    assert refused is not None and isinstance(refused.error, TensorError)
    assert [box.feed(frame) for frame in large[1:]] == [None] * (len(large) - 1)
    small = to_frames(pb.SessionRequest(id=2, forward=pb.Forward()), {"t": torch.zeros(3)})
    accepted = box.feed(next(small))
    assert accepted is not None and accepted.error is None


@pytest.mark.parametrize(
    "error",
    [
        errors.TensorError("a"),
        errors.AdapterError("b"),
        errors.StaleStateError("c"),
        errors.ResourceExhaustedError("d", 2.5),
        errors.DrainingError("e"),
    ],
)
def test_errors_survive_the_wire(error: errors.TrunklineError) -> None:
    back = to_exception(to_message(error))
    assert type(back) is type(error) and str(back) == str(error)
    assert getattr(back, "retry_after_s", None) == getattr(error, "retry_after_s", None)
