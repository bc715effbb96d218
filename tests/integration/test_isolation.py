"""Two tenants on one trunk: nothing of one reaches the other, and nobody goes on without rights."""

from __future__ import annotations

import json
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from peft import LoraConfig

from client_service.certificates import write_certificates
from client_service.credentials import TLS_VARIABLE, TOKEN_VARIABLE, Credentials
from shared.errors import (
    AuthenticationError,
    ResourceExhaustedError,
    SharedWeightsError,
    StaleStateError,
    TrunklineError,
    UnknownRequestError,
    UnknownSessionError,
)
from shared.pb.trunkline.v1 import trunk_pb2 as pb
from tests.by_hand import ByHand
from tests.conftest import Daemon, start_daemon
from tests.patience import PATIENCE_S

HIDDEN = torch.randn(2, 6, 128, generator=torch.Generator().manual_seed(0))
LORA = LoraConfig(r=4, target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True)
TOKENS = {name: f"{name}-0123456789abcdef" for name in ("alice", "bob", "carol")}


@dataclass
class Site:
    """A daemon with TLS and tokens that several tenants use."""

    daemon: Daemon
    folder: Path

    def write_tokens(self, *tenants: str) -> None:
        file = self.folder / "tokens"
        file.write_text("".join(f"{t} {TOKENS[t]}\n" for t in tenants), encoding="utf-8")
        file.chmod(0o600)

    def open(self, tenant: str) -> ByHand:
        token = self.folder / f"{tenant}.token"
        token.write_text(TOKENS[tenant])
        token.chmod(0o600)
        credentials = Credentials(self.folder / "pki/clients" / tenant, token)
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv(TLS_VARIABLE, str(credentials.tls))
            environment.setenv(TOKEN_VARIABLE, str(token))
            opened = ByHand(self.daemon.address, LORA, seed=len(tenant))
        opened.session._link._credentials = credentials  # of later connections
        return opened

    def metrics(self) -> str:
        lines = (json.loads(line) for line in self.daemon.log().splitlines())
        address = next(line["address"] for line in lines if line["message"] == "metrics")
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=PATIENCE_S) as answer:
            return str(answer.read().decode())


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    write_certificates(folder / "pki", tenants=list(TOKENS))
    made = Site(Daemon(None, {}, folder), folder)  # type: ignore[arg-type]
    made.write_tokens(*TOKENS)
    flags = ["--tls", str(folder / "pki/server"), "--tokens", str(folder / "tokens")]
    flags += ["--metrics", "127.0.0.1:0", "--tenant-max-sessions", "2"]
    flags += ["--tenant-held-bytes", "20000000", "--session-held-bytes", "20000000"]
    flags += ["--tenant-pushes-per-minute", "30", "--tenant-adapter-parameters", "60000"]
    made.daemon = start_daemon(folder, *flags)
    yield made
    made.daemon.process.terminate()
    assert made.daemon.process.wait(timeout=PATIENCE_S) == 0
    log = made.daemon.log()
    assert not [token for token in TOKENS.values() if token in log]


@pytest.fixture
def pair(site: Site) -> Iterator[tuple[ByHand, ByHand]]:
    with closing(site.open("alice")) as alice, closing(site.open("bob")) as bob:
        yield alice, bob


def message_of(call: Callable[[], Any]) -> tuple[type[TrunklineError], str]:
    with pytest.raises(TrunklineError) as caught:
        call()
    return type(caught.value), str(caught.value)


def test_a_foreign_id_answers_like_an_unknown_one(pair: tuple[ByHand, ByHand]) -> None:
    alice, bob = pair
    secret, unknown = uuid.uuid4().hex, uuid.uuid4().hex
    alice.forward(HIDDEN, request_id=secret, keep_graph=True)
    alice.forward(HIDDEN, cache_id=secret)
    foreign = message_of(lambda: bob.backward(HIDDEN, secret))
    assert foreign[0] is UnknownRequestError
    other = message_of(lambda: bob.backward(HIDDEN, unknown))
    assert foreign[1].replace(secret, "") == other[1].replace(unknown, "")
    # A cache of the same name is another cache: it begins empty.
    foreign, other = (
        message_of(lambda name=name: bob.forward(HIDDEN, cache_id=name, cached_tokens=6))
        for name in (secret, unknown)
    )
    assert foreign[0] is UnknownRequestError
    assert foreign[1].replace(secret, "") == other[1].replace(unknown, "")
    mask = torch.ones(2, 6, dtype=torch.bool)
    bob.forward(HIDDEN, cache_id=secret, attention_mask=mask)
    bob.session.release([secret], [secret])
    alice.backward(HIDDEN, secret)


def test_a_foreign_session_cannot_be_resumed(pair: tuple[ByHand, ByHand]) -> None:
    alice, bob = pair
    resumed = {}
    for name, session_id in (("foreign", alice.session.session_id), ("unknown", uuid.uuid4().hex)):
        message = pb.Open(resume_session_id=session_id, epoch=7)
        kind, text = message_of(
            lambda message=message: bob.session._link._open_at(bob.session.address, message)
        )
        assert kind is UnknownSessionError
        resumed[name] = text.replace(session_id, "")
    assert resumed["foreign"] == resumed["unknown"]
    alice.forward(HIDDEN)  # and hers was not disturbed


def test_weights_and_gradients_are_each_their_own(pair: tuple[ByHand, ByHand]) -> None:
    alice, bob = pair

    def found_by_bob() -> list[torch.Tensor]:
        output = bob.client.forward(HIDDEN)
        given = bob.client.backward(HIDDEN)
        parameters = bob.client.parameters()
        gradients = [p.grad for p in parameters if p.grad is not None]
        assert len(gradients) == len(parameters)
        for parameter in parameters:
            parameter.grad = None
        vectors, _ = bob.session.fetch([])
        return [output.detach(), given, *gradients, *vectors.values()]

    before, plain = found_by_bob(), alice.client.compute(HIDDEN)
    for name, parameter in alice.client.model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or "ln_1" in name)
    optimizer = torch.optim.SGD(alice.client.parameters(), lr=0.1)
    for _ in range(2):
        alice.client.forward(HIDDEN)
        alice.client.backward(HIDDEN)
        assert all(map(torch.equal, found_by_bob(), before))
        optimizer.step()
    assert not torch.equal(alice.client.compute(HIDDEN), plain)
    assert all(map(torch.equal, found_by_bob(), before))
    # Neither is read as a base weight, nor is a version of another's any of one's own.
    name = "transformer.h.2.attn.c_attn.lora_A.default.weight"
    with pytest.raises(SharedWeightsError):
        bob.session.fetch([name])
    with pytest.raises(StaleStateError):
        bob.forward(HIDDEN, state_version=alice.version)


def test_quotas_are_each_tenants_own(site: Site) -> None:
    with closing(site.open("carol")) as first, closing(site.open("carol")):
        with pytest.raises(ResourceExhaustedError, match="sessions"):
            site.open("carol")
        model = first.client.model
        model.add_adapter("large", LoraConfig(r=64, target_modules=["c_fc"], fan_in_fan_out=True))
        model.set_adapter("large")
        with pytest.raises(ResourceExhaustedError, match="tenant_adapter_parameters"):
            first.client.compute(HIDDEN)
        model.set_adapter("default")
        model.delete_adapter("large")
        first.client.compute(HIDDEN)
        held = 0
        with pytest.raises(ResourceExhaustedError, match="held-state") as spent:
            while held < 200:
                first.forward(HIDDEN.repeat(8, 2, 1), request_id=str(held), keep_graph=True)
                held += 1
        assert spent.value.retry_after_s > 0 and held
        assert not [name for name in ("alice", "bob", "local") if name in str(spent.value)]
        with closing(site.open("bob")) as bob:  # has all of its own
            bob.forward(HIDDEN, request_id="a", keep_graph=True)
            bob.backward(HIDDEN, "a")
        first.session.release([str(n) for n in range(held)], [])
        with pytest.raises(ResourceExhaustedError, match="tenant_pushes_per_minute") as early:
            for _ in range(100):  # one comes back every two seconds
                first.client.parameters()[0].data.add_(1.0)
                first.client.compute(HIDDEN)
        assert early.value.retry_after_s > 0


def test_metrics_name_tenants_and_nothing_else(site: Site, pair: tuple[ByHand, ByHand]) -> None:
    alice, _ = pair
    secret = uuid.uuid4().hex
    alice.forward(HIDDEN, request_id=secret, keep_graph=True)
    with pytest.raises(UnknownRequestError):
        alice.backward(HIDDEN, f"{secret}-other")
    text = site.metrics()
    assert 'trunkline_sessions{state="attached",tenant="alice"} 1.0' in text
    assert 'trunkline_held_bytes{tenant="alice"}' in text
    assert 'reason="UNKNOWN_REQUEST"' in text
    assert secret not in text and alice.session.session_id not in text


def test_a_right_that_ends_is_missed_at_once(site: Site) -> None:
    with closing(site.open("bob")) as bob, closing(site.open("alice")) as alice:
        bob.forward(HIDDEN, request_id="a", keep_graph=True)
        site.write_tokens("alice", "carol")
        try:
            with pytest.raises(AuthenticationError):
                bob.backward(HIDDEN, "a")
            alice.forward(HIDDEN)
            with pytest.raises(AuthenticationError):
                site.open("bob")
        finally:
            site.write_tokens(*TOKENS)
        bob.backward(HIDDEN, "a")  # nothing was lost


def test_reflection_and_channelz_are_off(site: Site) -> None:
    credentials = Credentials(site.folder / "pki/clients/alice", site.folder / "alice.token")
    with grpc.secure_channel(site.daemon.address, credentials.for_channel()) as channel:
        for method in (
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
            "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        ):
            call: Any = channel.stream_stream(method)
            with pytest.raises(grpc.RpcError) as refused:
                list(call(iter([b""])))
            assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED
        unary: Any = channel.unary_unary("/grpc.channelz.v1.Channelz/GetServers")
        with pytest.raises(grpc.RpcError) as refused:
            unary(b"")
        assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED
