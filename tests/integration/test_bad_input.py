"""Every bad input gets a typed error, while the daemon and the other sessions go on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
import torch
from peft import LoraConfig, VeraConfig

from client_service import SplitModelForCausalLM, TrainingClient
from client_service.calls import CacheEdit, ForwardCall, SessionTerms
from client_service.connection import SERVICE, open_channel
from client_service.optimizer_spec import OptimizerSettings, adamw
from client_service.session import TrunkSession
from shared.adapters.config import config_to_json
from shared.errors import (
    AdapterError,
    CheckpointError,
    ModelMismatchError,
    OptimizerError,
    ProtocolError,
    ResourceExhaustedError,
    ReusedRequestError,
    SplitError,
    StepConflictError,
    TensorError,
    TrunkUnavailableError,
    UnknownRequestError,
)
from shared.models import SplitRange
from shared.pb.trunkline.v1 import trunk_pb2 as pb
from shared.wire.frames import encode_frame
from tests.conftest import Daemon
from tests.models import save_tiny_model
from tests.patience import PATIENCE_S

LORA = LoraConfig(r=4, target_modules=["c_attn"])
HIDDEN = torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(0))
HELD = ForwardCall(request_id="a", keep_graph=True, training=True)


@pytest.fixture(scope="module")
def daemon(trunkd: Callable[..., Daemon], tmp_path_factory: pytest.TempPathFactory) -> Daemon:
    folder = save_tiny_model("gpt2", tmp_path_factory.mktemp("model"))
    return trunkd("--model", str(folder), "--max-tokens-per-request", "512")


@pytest.fixture
def session(daemon: Daemon) -> Iterator[TrunkSession]:
    """A session to abuse; afterwards it, and one opened before, must still answer right."""
    bystander = TrunkSession(daemon.address, SessionTerms())
    expected = bystander.forward(HIDDEN, ForwardCall()).hidden_BTD
    abused = TrunkSession(
        daemon.address, SessionTerms(peft_config_json=config_to_json(LORA), seed=1)
    )
    yield abused
    for still_open in (bystander, abused):
        assert torch.equal(still_open.forward(HIDDEN, ForwardCall()).hidden_BTD, expected)
        still_open.close()
    assert daemon.process.poll() is None


def with_value(value: float) -> torch.Tensor:
    hidden = HIDDEN.clone()
    hidden[1, 2, 3] = value
    return hidden


BAD_TENSORS: dict[str, tuple[torch.Tensor, dict[str, Any]]] = {
    "hidden size": (torch.zeros(2, 6, 32), {}),
    "rank": (torch.zeros(2, 64), {}),
    "empty": (torch.zeros(0, 6, 64), {}),
    "nan": (with_value(float("nan")), {}),
    "inf": (with_value(float("inf")), {}),
    "too long": (torch.zeros(1, 129, 64), {}),
    "too many tokens": (torch.zeros(5, 120, 64), {}),
    "short mask": (HIDDEN, {"attention_mask": torch.ones(2, 5)}),
    "mask of another batch": (HIDDEN, {"attention_mask": torch.ones(3, 6).long()}),
    "positions past the end": (HIDDEN, {"position_ids": torch.full((2, 6), 128)}),
    "negative positions": (HIDDEN, {"position_ids": torch.full((2, 6), -1)}),
    "positions of another shape": (HIDDEN, {"position_ids": torch.zeros(2, 5)}),
}


@pytest.mark.parametrize("what", BAD_TENSORS)
def test_a_bad_forward_is_refused(what: str, session: TrunkSession) -> None:
    hidden, extra = BAD_TENSORS[what]
    with pytest.raises(TensorError):
        session.forward(hidden, ForwardCall(**extra))


def raw(session: TrunkSession, tensors: list[pb.TensorSpec], data: bytes) -> None:
    """Sends a forward whose announcement and bytes are made up."""
    link = session._link
    request = pb.SessionRequest(id=link._next_id, forward=pb.Forward(), tensors=tensors)
    link._next_id += 1
    future: Future[Any] = Future()
    link._connection._waiting[request.id] = future
    link._connection._outgoing.put(iter([encode_frame(request, data)]))
    future.result(timeout=PATIENCE_S)


BLOCKS = pb.ENCODING_INT8_BLOCKS


def spec(
    shape: list[int], data_type: int = pb.DATA_TYPE_FLOAT32, encoding: int = 0
) -> pb.TensorSpec:
    kind, how = cast(Any, data_type), cast(Any, encoding)
    return pb.TensorSpec(name="hidden_states", data_type=kind, shape=shape, encoding=how)


@pytest.mark.parametrize(
    ("announced", "data", "error"),
    [
        ([spec([2**40, 2**40])], b"", TensorError),
        ([spec([1] * 9)], b"1234", TensorError),
        ([spec([1, 1, 64], 99)], b"", TensorError),
        ([spec([1, 1, 64], pb.DATA_TYPE_INT8)], bytes(64), TensorError),
        ([spec([1, 1, 64], encoding=7)], bytes(66), TensorError),
        ([spec([1, 1, 64], pb.DATA_TYPE_FLOAT16, BLOCKS)], bytes(66), TensorError),
        ([spec([1, 1, 64], encoding=BLOCKS)], bytes(67), ProtocolError),
        # A scale of not-a-number.
        ([spec([1, 1, 64], encoding=BLOCKS)], b"\xff\xff" + bytes(64), TensorError),
        ([spec([1, 1, 64], pb.DATA_TYPE_INT64)], bytes(512), TensorError),
        ([spec([1, 1, 64])], bytes(257), ProtocolError),
        ([spec([1, 1, 64]), spec([1, 1, 64])], bytes(512), ProtocolError),
        ([], b"", ProtocolError),
    ],
)
def test_a_made_up_announcement_is_refused(
    announced: list[pb.TensorSpec], data: bytes, error: type[Exception], session: TrunkSession
) -> None:
    with pytest.raises(error):
        raw(session, announced, data)


def test_request_ids_are_used_once_and_in_order(session: TrunkSession) -> None:
    with pytest.raises(UnknownRequestError, match="no forward had this id"):
        session.backward(HIDDEN, "a")
    first = session.forward(HIDDEN, HELD)
    again = session.forward(HIDDEN, HELD)
    assert torch.equal(first.hidden_BTD, again.hidden_BTD)
    with pytest.raises(ReusedRequestError):
        session.forward(HIDDEN + 1, HELD)
    session.backward(HIDDEN, "a")
    with pytest.raises(UnknownRequestError, match="backward was done"):
        session.backward(HIDDEN, "a")
    with pytest.raises(ReusedRequestError):
        session.forward(HIDDEN, HELD)


@pytest.mark.parametrize("bad", [torch.zeros(2, 5, 64), with_value(float("nan"))])
def test_a_bad_gradient_leaves_the_forward_held(bad: torch.Tensor, session: TrunkSession) -> None:
    session.forward(HIDDEN, HELD)
    with pytest.raises(TensorError):
        session.backward(bad, "a")
    found, norm = session.backward(HIDDEN, "a")
    assert found is not None and norm > 0


def test_bad_steps_change_nothing(session: TrunkSession) -> None:
    session.forward(HIDDEN, HELD)
    session.backward(HIDDEN, "a")
    before = session.adapter()
    for number in (0, 2, 7):
        with pytest.raises(StepConflictError):
            session.step(number, 1.0, adamw(0.1))
    for optimizer in (
        OptimizerSettings("lbfgs"),
        OptimizerSettings("adamw", {"momentum": 1.0}),
        adamw(float("nan")),
        adamw(-1.0),
    ):
        with pytest.raises(OptimizerError):
            session.step(1, 1.0, optimizer)
    with pytest.raises(ProtocolError):
        session.step(1, float("nan"), adamw(0.1))
    assert all(torch.equal(before[n], w) for n, w in session.adapter().items())
    session.step(1, 0.0, adamw(0.0))


@pytest.mark.parametrize("harm", ["missing", "foreign", "shape", "nan", "integers"])
def test_a_bad_adapter_upload_changes_nothing(harm: str, session: TrunkSession) -> None:
    before = session.adapter()
    given = {name: torch.ones_like(weight) for name, weight in before.items()}
    name = min(given)
    if harm == "missing":
        del given[name]
    elif harm == "foreign":
        given["../../etc/passwd"] = torch.ones(1)
    elif harm == "shape":
        given[name] = torch.ones(3, 3)
    elif harm == "nan":
        given[name].view(-1)[0] = float("nan")
    else:
        given[name] = given[name].long()
    with pytest.raises(AdapterError):
        session.restore(given)
    assert all(torch.equal(before[n], w) for n, w in session.adapter().items())


REFUSED_ADAPTERS = [
    {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 128},
    {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 10**12},
    {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4, "encoder_hidden_size": 10**9},
    {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4},
    {"peft_type": "P_TUNING", "num_virtual_tokens": 4},
    {"peft_type": "ADALORA", "total_step": 9, "init_r": 10**6},
    {"peft_type": "ADALORA", "total_step": 9, "rank_pattern": {"transformer.h.2.x.lora_E": []}},
    {"peft_type": "LORA", "modules_to_save": ["wte"]},
    {"peft_type": "IA3", "feedforward_modules": ["c_fc"], "target_modules": ["c_attn"]},
    {"peft_type": "NO_SUCH_METHOD"},
    {"peft_type": "LORA", "init_lora_weights": "pissa"},
    {"peft_type": "LORA", "megatron_core": "os"},
    {"peft_type": "LORA", "bias": "all"},
    {"peft_type": "LORA", "r": 100_000},
    {"peft_type": "LORA", "r": 0},
    {"peft_type": "LORA", "target_modules": r"(.+)+x"},
    {"peft_type": "LORA", "target_modules": "a*b*c*d*e*"},
    {"peft_type": "LORA", "rank_pattern": {r"(\w*)*!": 4}},
    {"peft_type": "LORA", "no_such_field": 1},
    {"peft_type": "LORA", "target_modules": ["no_such_module"]},
]


@pytest.mark.parametrize("fields", REFUSED_ADAPTERS, ids=lambda f: str(sorted(f.items())))
def test_a_refused_adapter_opens_no_session(
    fields: dict[str, Any], daemon: Daemon, session: TrunkSession
) -> None:
    with pytest.raises(AdapterError):
        TrunkSession(daemon.address, SessionTerms(peft_config_json=json.dumps(fields)))


def test_an_unknown_method_is_refused_before_anything_is_sent(daemon: Daemon) -> None:
    with pytest.raises(AdapterError, match=r"VERA is not accepted; accepted: .*LORA"):
        TrainingClient(daemon.address, VeraConfig(task_type="CAUSAL_LM"))


def test_another_split_or_other_weights_are_refused(daemon: Daemon, tmp_path: Path) -> None:
    with pytest.raises(ModelMismatchError, match="3:9"):
        TrunkSession(daemon.address, SessionTerms(split=(3, 9)))
    with pytest.raises(ModelMismatchError, match="digest"):
        TrunkSession(daemon.address, SessionTerms(weight_digest="0" * 64))
    other = save_tiny_model("gpt2", tmp_path / "other", layer_norm_epsilon=1e-3)
    with pytest.raises(ModelMismatchError, match="digest"):
        SplitModelForCausalLM.from_pretrained(other, daemon.address)


def test_an_unreachable_trunk_is_named_with_its_cause(daemon: Daemon, tmp_path: Path) -> None:
    folder = save_tiny_model("gpt2", tmp_path)
    with pytest.raises(TrunkUnavailableError, match=r"127\.0\.0\.1:1: .*refused"):
        SplitModelForCausalLM.from_pretrained(folder, "127.0.0.1:1")


def test_garbage_ends_its_own_stream_only(daemon: Daemon, session: TrunkSession) -> None:
    with open_channel(daemon.address) as channel:
        call = channel.stream_stream(f"{SERVICE}/Session")
        with pytest.raises(grpc.RpcError) as caught:
            next(call(iter([b"\xff\xff\xff"])))
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_session_begins_with_open(daemon: Daemon) -> None:
    with open_channel(daemon.address) as channel:
        call = channel.stream_stream(f"{SERVICE}/Session")
        first = pb.SessionRequest(id=1, release=pb.Release()).SerializeToString()
        answer = pb.SessionResponse.FromString(next(call(iter([first]))))
    assert answer.error.code == pb.ERROR_CODE_PROTOCOL


def test_a_spent_budget_recomputes_and_then_refuses(
    trunkd: Callable[..., Daemon], tmp_path: Path
) -> None:
    folder = save_tiny_model("gpt2", tmp_path)
    roomy = trunkd("--model", str(folder))
    # A few boundary activations and the adapter's gradient, and not a single graph.
    tight = trunkd("--model", str(folder), "--session-held-bytes", str(20 * HIDDEN.nbytes))
    gradients = []
    for daemon in (roomy, tight):
        session = TrunkSession(
            daemon.address, SessionTerms(peft_config_json=config_to_json(LORA), seed=1)
        )
        for number in range(20):
            call = ForwardCall(request_id=str(number), keep_graph=True, training=True)
            session.forward(HIDDEN, call)
        if daemon is tight:
            for refused in (
                lambda s=session: s.forward(HIDDEN, HELD),
                lambda s=session: s.backward(HIDDEN, "0"),
            ):
                with pytest.raises(ResourceExhaustedError) as caught:
                    refused()
                assert caught.value.retry_after_s > 0
        session.release([str(number) for number in range(1, 20)], [])
        gradients.append(session.backward(HIDDEN, "0")[0])
        session.forward(HIDDEN, HELD)  # there is room again
        session.close()
    assert torch.equal(*gradients)  # recomputing changed no bit


@pytest.mark.parametrize("text", ["2", "a:b", "2:10:3", "-1:4", ""])
def test_a_split_is_two_numbers(text: str) -> None:
    with pytest.raises(SplitError):
        SplitRange.parse(text)


@pytest.mark.parametrize("text", ["0:4", "4:4", "5:3", "2:12", "2:99"])
def test_a_split_leaves_both_ends_a_block(text: str) -> None:
    with pytest.raises(SplitError, match="12"):
        SplitRange.parse(text).check(12)


def test_a_bad_model_folder_is_named(daemon: Daemon, tmp_path: Path) -> None:
    truncated = save_tiny_model("gpt2", tmp_path / "truncated")
    weights = truncated / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.json").write_text('{"model_type": "bert"}')
    for folder, why in (
        (tmp_path / "missing", "no such model folder"),
        (truncated, "model.safetensors"),
        (foreign, "accepted: gpt2"),
    ):
        with pytest.raises(CheckpointError, match=why):
            SplitModelForCausalLM.from_pretrained(folder, daemon.address)


def test_cache_edits_stay_within_the_budget_one_by_one(session: TrunkSession) -> None:
    session.forward(HIDDEN, ForwardCall(cache_id="c"))
    edits = [CacheEdit(repeats=2_000_000), CacheEdit(reorder=[0])]
    with pytest.raises(ResourceExhaustedError, match="edit"):
        session.forward(HIDDEN[:1], ForwardCall(cache_id="c", cache_edits=edits))
    with pytest.raises(ProtocolError, match="rows"):
        session.forward(HIDDEN, ForwardCall(cache_id="c", cache_edits=[CacheEdit(reorder=[7, 7])]))
    session.forward(HIDDEN, ForwardCall(cache_id="c"))


def test_a_cache_that_lacks_a_token_is_refused_without_a_mask_too(session: TrunkSession) -> None:
    tokens = HIDDEN.shape[1]
    new = HIDDEN[:, :1]
    session.forward(HIDDEN, ForwardCall(cache_id="c", cached_tokens=0))
    session.forward(new, ForwardCall(cache_id="c", cached_tokens=tokens))
    with pytest.raises(ProtocolError, match=rf"has {tokens + 1} tokens, the client counts"):
        session.forward(new, ForwardCall(cache_id="c", cached_tokens=tokens + 2))
    edit = [CacheEdit(remove_tokens=1)]
    session.forward(new, ForwardCall(cache_id="c", cache_edits=edit, cached_tokens=tokens))


def test_a_step_ends_what_was_held_before_it(session: TrunkSession) -> None:
    session.forward(HIDDEN, HELD)
    session.forward(HIDDEN, ForwardCall(request_id="b", keep_graph=True, training=True, micro=1))
    session.backward(HIDDEN, "a")
    session.step(1, 1.0, adamw(0.0))
    with pytest.raises(UnknownRequestError):
        session.backward(HIDDEN, "b")
    session.restore({name: torch.zeros_like(w) for name, w in session.adapter().items()})
