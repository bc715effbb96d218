"""A peer that speaks the protocol itself, and sends what our own client never would."""

from __future__ import annotations

import json
import queue
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig

from client_service.calls import ForwardCall, SessionTerms
from client_service.connection import SERVICE, open_channel
from client_service.session import TrunkSession
from shared.errors import AdapterError, TensorError
from shared.pb.trunkline.v1 import trunk_pb2 as pb
from shared.tensor_bytes import as_bytes
from shared.versions import library_versions
from shared.wire.error_codes import to_exception
from shared.wire.frames import encode_frame
from shared.wire.messages import Inbox, to_frames
from shared.wire.structures import write_structure, write_values
from shared.wire.tensors import announce
from tests.by_hand import ByHand
from tests.conftest import Daemon
from tests.models import save_tiny_model

LORA = LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
MODULE = "transformer.h.2.attn.c_attn"
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


def open_session(daemon: Daemon) -> TrunkSession:
    return TrunkSession(daemon.address, SessionTerms())


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
    expected = session.forward(HIDDEN, ForwardCall(attention_mask=causal))
    found = session.forward(HIDDEN, ForwardCall(attention_mask=causal.to(dtype)))
    assert torch.equal(found, expected)
    session.close()


Change = Callable[[pb.AdapterState], object]


def first(state: pb.AdapterState) -> pb.AdapterSpec:
    return state.structure.adapters[0]


def setting(name: str, **value: Any) -> Change:
    return lambda state: first(state).settings[name].CopyFrom(pb.Setting(**value))


MALFORMED: dict[str, Change] = {
    "a pattern": lambda s: first(s).target_modules.append("(.+)+x"),
    "a module of the client's": lambda s: first(s).target_modules.append("transformer.h.0.attn"),
    "no module": lambda s: first(s).ClearField("target_modules"),
    "a foreign module to save": lambda s: first(s).modules_to_save.append("transformer.wte"),
    "a feed-forward of another": lambda s: first(s).feedforward_modules.append("c_fc"),
    "a rank of a pattern": lambda s: first(s).ranks.update({"c_attn": 4}),
    "a rank of none": lambda s: first(s).ranks.update({MODULE: 0}),
    "a vast rank": lambda s: first(s).ranks.update({MODULE: 2**31}),
    "an infinite alpha": lambda s: first(s).alphas.update({MODULE: float("inf")}),
    "no such method": lambda s: setattr(first(s), "peft_type", "NO_SUCH_METHOD"),
    "another method": lambda s: setattr(first(s), "peft_type", "VERA"),
    "virtual tokens": lambda s: setattr(first(s), "peft_type", "PREFIX_TUNING"),
    "no such field": setting("no_such_field", integer=1),
    "a vast r": setting("r", integer=100_000),
    "an r of none": setting("r", integer=0),
    "a negative r": setting("r", integer=-4),
    "an r in words": setting("r", word="8"),
    "an alpha in words": setting("lora_alpha", word="16"),
    "dropout above one": setting("lora_dropout", real=5.0),
    "an initialisation": setting("init_lora_weights", word="pissa"),
    "a module to import": setting("megatron_core", word="os"),
    "a file": setting("base_model_name_or_path", word="/etc/passwd"),
    "biases": setting("bias", word="all"),
    "no layers": lambda s: s.structure.ClearField("layers"),
    "a layer twice": lambda s: s.structure.layers.append(s.structure.layers[0]),
    "a layer of nobody": lambda s: s.structure.layers.add(module="os.path"),
    "an adapter twice": lambda s: s.structure.adapters.append(first(s)),
    "without a name": lambda s: setattr(first(s), "name", ""),
    "a foreign value": lambda s: s.values[0].CopyFrom(pb.Value(names=["../../etc/passwd"])),
    "a value of two places": lambda s: s.values[0].names.append("transformer.h.2.mlp.c_fc.weight"),
}


def pushed(tenant: ByHand, change: Change | None = None) -> Any:
    """A forward that brings an adapter as the client has it, changed."""
    push = tenant.everything()
    state = pb.AdapterState(version=push.version, structure=write_structure(push.structure))
    state.values.extend(write_values(push.values))
    if change is not None:
        change(state)
    tensors = {f"value/{i}": tensor for i, tensor in enumerate(push.tensors)}
    body = pb.Forward(state=state, state_version=push.version)
    return tenant.session._link.ask(
        pb.SessionRequest(forward=body), {"hidden_states": HIDDEN} | tensors
    )


@pytest.fixture(scope="module")
def tenant(daemon: Daemon) -> Iterator[ByHand]:
    opened = ByHand(daemon.address, LORA)
    yield opened
    opened.close()


@pytest.mark.parametrize("what", MALFORMED)
def test_a_malformed_adapter_changes_nothing(what: str, tenant: ByHand) -> None:
    before = tenant.forward(HIDDEN)
    with pytest.raises(AdapterError):
        pushed(tenant, MALFORMED[what])
    assert torch.equal(tenant.forward(HIDDEN), before)


def test_what_is_not_malformed_is_taken(tenant: ByHand) -> None:
    expected = tenant.forward(HIDDEN)
    found = pushed(tenant).tensors["hidden_states"]
    assert torch.equal(found, expected)
    tenant.client._passage.function._sent.forget()  # it has another version now
    assert torch.equal(tenant.client.compute(HIDDEN), expected)


def test_nothing_here_was_an_internal_error(daemon: Daemon) -> None:
    entries = [json.loads(line) for line in daemon.log().splitlines() if line.startswith("{")]
    assert [e["traceback"] for e in entries if "traceback" in e] == []
    assert daemon.process.poll() is None
