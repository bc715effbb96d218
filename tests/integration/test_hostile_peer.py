"""A peer that speaks the protocol itself, and sends what our own client never would."""

from __future__ import annotations

import json
import queue
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch

from client_service.calls import ForwardCall, SessionTerms
from client_service.connection import SERVICE, open_channel
from client_service.optimizer_spec import OptimizerSettings, adamw
from client_service.session import TrunkSession
from shared.errors import AdapterError, OptimizerError, TensorError
from shared.pb.trunkline.v1 import trunk_pb2 as pb
from shared.tensor_bytes import as_bytes
from shared.versions import library_versions
from shared.wire.error_codes import to_exception
from shared.wire.frames import encode_frame
from shared.wire.messages import Inbox, to_frames
from shared.wire.tensors import announce
from tests.conftest import Daemon
from tests.models import save_tiny_model

LORA = {"peft_type": "LORA", "r": 4, "target_modules": ["c_attn"]}
HIDDEN = torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(0))


class Peer:
    """A stream of hand-made frames, its session open."""

    def __init__(self, address: str) -> None:
        self._channel = open_channel(address)
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        method = self._channel.stream_stream(f"{SERVICE}/Session")
        self._call: Any = method(iter(self._outgoing.get, None))
        self._inbox = Inbox(pb.SessionResponse, lambda _: 1 << 30, 1 << 30)
        opened = pb.Open(start_layer=2, end_layer=10, library_versions=library_versions())
        self.send(pb.SessionRequest(id=1, open=opened))
        assert self.receive().open.session_id

    def send(self, request: pb.SessionRequest) -> None:
        self._outgoing.put(request.SerializeToString())

    def send_frame(self, frame: bytes) -> None:
        self._outgoing.put(frame)

    def receive(self) -> pb.SessionResponse:
        while (incoming := self._inbox.feed(next(self._call))) is None:
            pass
        assert incoming.error is None
        return incoming.message

    def close(self) -> None:
        self._outgoing.put(None)
        assert list(self._call) == []  # the trunk ends the stream too, without an error
        self._channel.close()


@pytest.fixture(scope="module")
def daemon(trunkd: Callable[..., Daemon], tmp_path_factory: pytest.TempPathFactory) -> Daemon:
    return trunkd("--model", str(save_tiny_model("gpt2", tmp_path_factory.mktemp("model"))))


@pytest.fixture
def peer(daemon: Daemon) -> Iterator[Peer]:
    opened = Peer(daemon.address)
    yield opened
    opened.close()


def open_session(daemon: Daemon, fields: Mapping[str, Any] | None = None) -> TrunkSession:
    text = json.dumps(fields) if fields else ""
    return TrunkSession(daemon.address, SessionTerms(peft_config_json=text, seed=1))


@pytest.mark.parametrize("shape", [[0, 2**64 - 1], [0, 2**62, 2**62], [2**63, 2**63]])
def test_an_empty_tensor_of_vast_dimensions_leaves_the_stream_usable(
    shape: list[int], peer: Peer
) -> None:
    vast = pb.TensorSpec(name="hidden_states", data_type=pb.DATA_TYPE_FLOAT32, shape=shape)
    peer.send(pb.SessionRequest(id=2, tensors=[vast], forward=pb.Forward()))
    assert isinstance(to_exception(peer.receive().error), TensorError)
    peer.send(pb.SessionRequest(id=3, release=pb.Release()))
    assert peer.receive().WhichOneof("body") == "release"


def test_frames_of_two_requests_may_interleave(peer: Peer) -> None:
    tensors = {"hidden_states": HIDDEN, "position_ids": torch.arange(6)[None]}

    def in_two(number: int) -> list[bytes]:
        head = pb.SessionRequest(id=number, forward=pb.Forward(), tensors=announce(tensors))
        messages = (head, pb.SessionRequest(id=number))
        return [
            encode_frame(m, as_bytes(t)) for m, t in zip(messages, tensors.values(), strict=True)
        ]

    first, second = in_two(2), in_two(3)
    for frame in (first[0], second[0], second[1], first[1]):
        peer.send_frame(frame)
    answers = [peer.receive(), peer.receive()]
    assert [(a.id, a.WhichOneof("body")) for a in answers] == [(3, "forward"), (2, "forward")]


def test_a_message_that_comes_again_is_not_done_again(peer: Peer) -> None:
    tensors = {"hidden_states": HIDDEN}
    frames = list(to_frames(pb.SessionRequest(id=5, forward=pb.Forward()), tensors))
    for frame in (*frames, *frames):
        peer.send_frame(frame)
    assert [peer.receive().id for _ in range(2)] == [5, 5]
    peer.send(pb.SessionRequest(id=5, release=pb.Release()))
    assert "was a forward before" in peer.receive().error.message
    peer.send(pb.SessionRequest(id=6, acknowledged=5, release=pb.Release()))
    assert peer.receive().WhichOneof("body") == "release"
    peer.send_frame(frames[0])
    assert "is not kept any more" in peer.receive().error.message


FULL = (2, 1, 6, 6)


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(FULL, dtype=torch.int64),
        torch.ones(FULL, dtype=torch.uint8),
        torch.full(FULL, float("nan")),
        torch.full(FULL, float("inf")),
        torch.zeros(2, 1, 6, 7),
        torch.zeros(2, 6),
    ],
    ids=lambda m: f"{m.dtype} {tuple(m.shape)} {float(m.flatten()[0])}",
)
def test_a_mask_attention_cannot_use_is_refused(mask: torch.Tensor, daemon: Daemon) -> None:
    session = open_session(daemon)
    with pytest.raises(TensorError, match="attention_mask"):
        session._link.ask(
            pb.SessionRequest(forward=pb.Forward()),
            {"hidden_states": HIDDEN, "attention_mask": mask},
        )
    session.close()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_an_additive_mask_may_have_another_dtype(dtype: torch.dtype, daemon: Daemon) -> None:
    session = open_session(daemon)
    causal = torch.full((2, 1, 6, 6), float("-inf")).triu(1)
    expected = session.forward(HIDDEN, ForwardCall(attention_mask=causal)).hidden_BTD
    found = session.forward(HIDDEN, ForwardCall(attention_mask=causal.to(dtype))).hidden_BTD
    assert torch.equal(found, expected)
    session.close()


@pytest.mark.parametrize(
    "change",
    [
        {"target_modules": "("},
        {"target_modules": 5},
        {"target_modules": [5]},
        {"exclude_modules": "["},
        {"rank_pattern": [1]},
        {"rank_pattern": {"(": 8}},
        {"rank_pattern": {"c_attn": "8"}},
        {"alpha_pattern": [1]},
        {"alpha_pattern": {"c_attn": float("inf")}},
        {"layers_to_transform": [3], "layers_pattern": "("},
        {"modules_to_save": 5},
        {"lora_alpha": float("nan")},
        {"lora_alpha": "16"},
        {"lora_dropout": 5},
        {"r": "8"},
    ],
    ids=str,
)
def test_a_malformed_adapter_is_an_adapter_error(change: dict[str, Any], daemon: Daemon) -> None:
    with pytest.raises(AdapterError):
        open_session(daemon, LORA | change)


@pytest.mark.parametrize("text", ["[" * 50_000, '{"a":' * 9_000, "[]", "nonsense", '"LORA"'])
def test_what_is_no_adapter_configuration_is_an_adapter_error(text: str, daemon: Daemon) -> None:
    with pytest.raises(AdapterError, match="PEFT configuration"):
        TrunkSession(daemon.address, SessionTerms(peft_config_json=text))


@pytest.mark.parametrize(
    "bad",
    [
        adamw(0.1, beta2=1.5),
        adamw(0.1, beta1=1.5),
        adamw(0.1, beta1=1.0),
        adamw(0.1, beta2=1.0),
        adamw(1e300),
        OptimizerSettings("adamw", {"lr": 0.1}, {"amsgrad": True}),
        OptimizerSettings("adamw", {"lr": 0.1}, {"foreach": True, "fused": True}),
        OptimizerSettings("sgd", {"lr": 0.1}),
    ],
    ids=str,
)
def test_a_bad_later_step_changes_nothing(bad: OptimizerSettings, daemon: Daemon) -> None:
    session = open_session(daemon, LORA)
    run_to_step(session, 1)
    session.step(1, 1.0, adamw(0.1))
    run_to_step(session, 2)
    before, gradients = session.adapter(), session.gradients()
    with pytest.raises(OptimizerError):
        session.step(2, 1.0, bad)
    assert all(torch.equal(before[n], w) for n, w in session.adapter().items())
    assert all(torch.equal(gradients[n], g) for n, g in session.gradients().items())
    session.step(2, 1.0, adamw(0.1))
    session.close()


def test_a_flag_that_is_no_longer_given_is_off_again(daemon: Daemon) -> None:
    adapters = []
    for flags in ({}, {"maximize": True}):
        session = open_session(daemon, LORA)
        run_to_step(session, 1)
        session.step(1, 0.0, OptimizerSettings("sgd", {"lr": 0.1}, flags))
        run_to_step(session, 2)
        session.step(2, 1.0, OptimizerSettings("sgd", {"lr": 0.1}))
        adapters.append(session.adapter())
        session.close()
    assert all(torch.equal(adapters[0][name], w) for name, w in adapters[1].items())


def run_to_step(session: TrunkSession, step: int) -> None:
    call = ForwardCall(request_id=str(step), keep_graph=True, training=True, step=step)
    session.forward(HIDDEN, call)
    session.backward(HIDDEN, str(step))


def test_nothing_here_was_an_internal_error(daemon: Daemon) -> None:
    entries = [json.loads(line) for line in daemon.log().splitlines() if line.startswith("{")]
    assert [e["traceback"] for e in entries if "traceback" in e] == []
    assert daemon.process.poll() is None
