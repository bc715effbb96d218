"""Every bad input gets a typed error, while the daemon and the other sessions go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
import torch
from peft import LoraConfig, OFTConfig

from client_service import SplitModelForCausalLM
from client_service.calls import CacheEdit, ForwardCall, SessionTerms
from client_service.connection import SERVICE, open_channel
from client_service.session import TrunkSession
from shared.errors import (
    AdapterError,
    CheckpointError,
    ModelMismatchError,
    ProtocolError,
    ResourceExhaustedError,
    ReusedRequestError,
    SplitError,
    StaleStateError,
    TensorError,
    TrunkUnavailableError,
    UnknownRequestError,
)
from shared.models import SplitRange
from shared.pb.trunkline.v1 import trunk_pb2 as pb
from shared.wire.frames import encode_frame
from tests.by_hand import ByHand
from tests.conftest import Daemon
from tests.models import save_tiny_model
from tests.patience import PATIENCE_S

LORA = LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
HIDDEN = torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(0))
HELD: dict[str, Any] = {"request_id": "a", "keep_graph": True, "training": True}


@pytest.fixture(scope="module")
def daemon(trunkd: Callable[..., Daemon], tmp_path_factory: pytest.TempPathFactory) -> Daemon:
    folder = save_tiny_model("gpt2", tmp_path_factory.mktemp("model"))
    return trunkd("--model", str(folder), "--max-tokens-per-request", "512")


@pytest.fixture
def tenant(daemon: Daemon) -> Iterator[ByHand]:
    """A tenant that abuses; afterwards it, and one from before, must still be answered right."""
    bystander, abusing = ByHand(daemon.address, None), ByHand(daemon.address, LORA)
    both = bystander, abusing
    expected = [one.forward(HIDDEN) for one in both]
    assert not torch.equal(*expected)
    yield abusing
    for one, output in zip(both, expected, strict=True):
        assert torch.equal(one.forward(HIDDEN), output)
        one.close()
    assert daemon.process.poll() is None and '"traceback"' not in daemon.log()


def with_value(value: float) -> torch.Tensor:
    hidden = HIDDEN.clone()
    hidden[1, 2, 3] = value
    return hidden


BAD_TENSORS: dict[str, tuple[torch.Tensor, dict[str, Any]]] = {
    "hidden size": (torch.zeros(2, 6, 32), {}),
    "rank": (torch.zeros(2, 64), {}),
    "empty": (torch.zeros(0, 6, 64), {}),
    "too long": (torch.zeros(1, 129, 64), {}),
    "too many tokens": (torch.zeros(5, 120, 64), {}),
    "short mask": (HIDDEN, {"attention_mask": torch.ones(2, 5)}),
    "mask of another batch": (HIDDEN, {"attention_mask": torch.ones(3, 6).long()}),
    "positions past the end": (HIDDEN, {"position_ids": torch.full((2, 6), 128)}),
    "negative positions": (HIDDEN, {"position_ids": torch.full((2, 6), -1)}),
    "positions of another shape": (HIDDEN, {"position_ids": torch.zeros(2, 5)}),
}


@pytest.mark.parametrize("what", BAD_TENSORS)
def test_a_bad_forward_is_refused(what: str, tenant: ByHand) -> None:
    hidden, extra = BAD_TENSORS[what]
    with pytest.raises(TensorError):
        tenant.forward(hidden, **extra)


def raw(tenant: ByHand, tensors: list[pb.TensorSpec], data: bytes) -> None:
    """Sends a forward whose announcement and bytes are made up."""
    link, body = tenant.session._link, pb.Forward(state_version=tenant.version)
    request = pb.SessionRequest(id=link._next_id, forward=body, tensors=tensors)
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
        ([spec([1, 1, 64], pb.DATA_TYPE_INT64)], bytes(512), TensorError),
        ([spec([1, 1, 64])], bytes(257), ProtocolError),
        ([spec([1, 1, 64]), spec([1, 1, 64])], bytes(512), ProtocolError),
        ([], b"", ProtocolError),
    ],
)
def test_a_made_up_announcement_is_refused(
    announced: list[pb.TensorSpec], data: bytes, error: type[Exception], tenant: ByHand
) -> None:
    with pytest.raises(error):
        raw(tenant, announced, data)


def test_request_ids_are_used_once_and_in_order(tenant: ByHand) -> None:
    with pytest.raises(UnknownRequestError, match="no forward had this id"):
        tenant.backward(HIDDEN, "a")
    assert torch.equal(tenant.forward(HIDDEN, **HELD), tenant.forward(HIDDEN, **HELD))
    with pytest.raises(ReusedRequestError):
        tenant.forward(HIDDEN + 1, **HELD)
    tenant.backward(HIDDEN, "a")
    with pytest.raises(UnknownRequestError, match="backward was done"):
        tenant.backward(HIDDEN, "a")


def test_a_bad_gradient_leaves_the_forward_held(tenant: ByHand) -> None:
    tenant.forward(HIDDEN, **HELD)
    with pytest.raises(TensorError):
        tenant.backward(HIDDEN[:, 1:], "a")
    with pytest.raises(TensorError, match="without a value 'no/such'"):
        tenant.backward(HIDDEN, "a", "no/such")
    name = next(v.names[0] for v in tenant.everything().values if "lora_B" in v.names[0])
    found, of_values = tenant.backward(HIDDEN, "a", name)
    assert found is not None and found.norm() > 0 and of_values[name].norm() > 0


def test_numbers_that_are_none_pass_unless_the_host_checks(
    tenant: ByHand, trunkd: Callable[..., Daemon], tiny_gpt2: Path
) -> None:
    """As through the whole model: a loss scaler looks for them at the client."""
    broken = with_value(float("nan"))
    tenant.forward(HIDDEN, **HELD)
    found, _ = tenant.backward(broken, "a")
    assert found is not None and found.isnan().any() and not found[0].isnan().any()
    assert tenant.forward(broken)[1].isnan().any()
    strict = TrunkSession(
        trunkd("--model", str(tiny_gpt2), "--check-finite").address, SessionTerms()
    )
    strict.forward(HIDDEN, ForwardCall(**HELD))
    for value in ("nan", "inf"):
        bad = with_value(float(value))
        with pytest.raises(TensorError, match="hidden_states holds NaN or Inf"):
            strict.forward(bad, ForwardCall())
        with pytest.raises(TensorError, match="gradient holds NaN or Inf"):
            strict.backward(bad, "a", True, [], [], False)
    strict.backward(HIDDEN, "a", True, [], [], False)
    strict.close()


def _without_one(values: list[Any], tensors: list[torch.Tensor], at: int) -> None:
    del values[at], tensors[at]


def _of_another_shape(values: list[Any], tensors: list[torch.Tensor], at: int) -> None:
    tensors[at] = torch.ones(3, 3)


def _of_whole_numbers(values: list[Any], tensors: list[torch.Tensor], at: int) -> None:
    tensors[at] = tensors[at].long()


def _of_bytes(values: list[Any], tensors: list[torch.Tensor], at: int) -> None:
    tensors[at] = torch.zeros(tensors[at].shape, dtype=torch.uint8)


def _of_twice_the_precision(values: list[Any], tensors: list[torch.Tensor], at: int) -> None:
    tensors[at] = tensors[at].double()


HARMS = [_without_one, _of_another_shape, _of_whole_numbers, _of_bytes, _of_twice_the_precision]


@pytest.mark.parametrize("harm", HARMS)
def test_a_bad_value_changes_nothing(harm: Callable[..., None], tenant: ByHand) -> None:
    before, push = tenant.forward(HIDDEN), tenant.everything()
    values, tensors = list(push.values), list(push.tensors)
    harm(values, tensors, next(i for i, v in enumerate(values) if "lora_A" in v.names[0]))
    bad = tenant.everything(values=tuple(values), tensors=tuple(tensors))
    with pytest.raises(AdapterError):
        tenant.push(HIDDEN, bad)
    assert torch.equal(tenant.forward(HIDDEN), before)


def test_indices_that_point_outside_change_nothing(
    trunkd: Callable[..., Daemon], tmp_path: Path
) -> None:
    folder = save_tiny_model("llama", tmp_path / "model")
    daemon = trunkd("--model", str(folder), "--split", "1:3")
    tenant = ByHand(daemon.address, OFTConfig(oft_block_size=4, target_modules=["q_proj"]))
    before, push = tenant.forward(HIDDEN), tenant.everything()
    at = next(i for i, v in enumerate(push.values) if v.names[0].endswith(".rows"))
    for outside in (push.tensors[at] + 10**6, push.tensors[at] - 10**6):
        tensors = (*push.tensors[:at], outside, *push.tensors[at + 1 :])
        with pytest.raises(AdapterError, match="cannot be computed"):
            tenant.push(HIDDEN, tenant.everything(tensors=tensors))
    assert torch.equal(tenant.forward(HIDDEN), before)
    tenant.close()


def test_versions_are_what_both_sides_mean(tenant: ByHand) -> None:
    output, version = tenant.forward(HIDDEN), tenant.version
    for wrong in (0, version + 1, 2**64 - 1):
        with pytest.raises(StaleStateError, match=f"here is {version}"):
            tenant.forward(HIDDEN, state_version=wrong)
    with pytest.raises(StaleStateError):  # a change of what is not here
        tenant.push(HIDDEN, tenant.everything(version=version + 6, since=version + 5))
    with pytest.raises(ProtocolError, match="of version"):
        tenant.push(HIDDEN, tenant.everything(since=version + 5))
    with pytest.raises(ProtocolError, match="in a forward that means"):
        tenant.forward(HIDDEN, push=tenant.everything())
    assert torch.equal(tenant.forward(HIDDEN), output)


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


def test_garbage_ends_its_own_stream_only(daemon: Daemon, tenant: ByHand) -> None:
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
    # A few boundary activations beside the adapter, and not a single graph.
    tight = trunkd("--model", str(folder), "--session-held-bytes", str(20 * HIDDEN.nbytes))
    gradients = []
    for daemon in (roomy, tight):
        tenant = ByHand(daemon.address, LORA)
        if daemon is tight:
            with pytest.raises(ResourceExhaustedError) as caught:
                for number in range(20):
                    tenant.forward(HIDDEN, request_id=str(number), keep_graph=True)
            assert caught.value.retry_after_s > 0 and number > 2
        else:
            tenant.forward(HIDDEN, request_id="0", keep_graph=True)
        tenant.session.release([str(number) for number in range(1, 20)], [])
        gradients.append(tenant.backward(HIDDEN, "0")[0])
        tenant.forward(HIDDEN, **HELD)  # there is room again
        tenant.close()
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


def test_cache_edits_stay_within_the_budget_one_by_one(tenant: ByHand) -> None:
    tenant.forward(HIDDEN, cache_id="c")
    edits = [CacheEdit(repeats=2_000_000), CacheEdit(reorder=[0])]
    with pytest.raises(ResourceExhaustedError, match="edit"):
        tenant.forward(HIDDEN[:1], cache_id="c", cache_edits=edits)
    with pytest.raises(ProtocolError, match="rows"):
        tenant.forward(HIDDEN, cache_id="c", cache_edits=[CacheEdit(reorder=[7, 7])])
    tenant.forward(HIDDEN, cache_id="c")


def test_a_cache_that_lacks_a_token_is_refused_without_a_mask_too(tenant: ByHand) -> None:
    tokens = HIDDEN.shape[1]
    new = HIDDEN[:, :1]
    tenant.forward(HIDDEN, cache_id="c", cached_tokens=0)
    tenant.forward(new, cache_id="c", cached_tokens=tokens)
    with pytest.raises(ProtocolError, match=rf"has {tokens + 1} tokens, the client counts"):
        tenant.forward(new, cache_id="c", cached_tokens=tokens + 2)
    edit = [CacheEdit(remove_tokens=1)]
    tenant.forward(new, cache_id="c", cache_edits=edit, cached_tokens=tokens)
