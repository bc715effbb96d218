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

from client_service.calls import ForwardCall, SessionTerms
from client_service.certificates import write_certificates
from client_service.credentials import Credentials
from client_service.optimizer_spec import adamw
from client_service.session import TrunkSession
from shared.adapters.config import config_to_json
from shared.errors import (
    AdapterError,
    AuthenticationError,
    ResourceExhaustedError,
    TrunklineError,
    UnknownRequestError,
    UnknownSessionError,
)
from shared.pb.trunkline.v1 import trunk_pb2 as pb
from tests.conftest import Daemon, start_daemon
from tests.patience import PATIENCE_S

HIDDEN = torch.randn(2, 6, 128, generator=torch.Generator().manual_seed(0))
CONFIG = config_to_json(LoraConfig(r=4, target_modules=["c_attn"], init_lora_weights=False))
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

    def open(self, tenant: str, **options: Any) -> TrunkSession:
        token = self.folder / f"{tenant}.token"
        token.write_text(TOKENS[tenant])
        token.chmod(0o600)
        credentials = Credentials(self.folder / "pki/clients" / tenant, token)
        terms = SessionTerms(peft_config_json=CONFIG, seed=len(tenant))
        return TrunkSession(
            self.daemon.address, terms, credentials=credentials, reconnect_timeout_s=0, **options
        )

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
    flags += ["--tenant-steps-per-minute", "6", "--tenant-adapter-parameters", "60000"]
    made.daemon = start_daemon(folder, *flags)
    yield made
    made.daemon.process.terminate()
    assert made.daemon.process.wait(timeout=PATIENCE_S) == 0
    log = made.daemon.log()
    assert not [token for token in TOKENS.values() if token in log]


@pytest.fixture
def pair(site: Site) -> Iterator[tuple[TrunkSession, TrunkSession]]:
    with closing(site.open("alice")) as alice, closing(site.open("bob")) as bob:
        yield alice, bob


def message_of(call: Callable[[], Any]) -> tuple[type[TrunklineError], str]:
    with pytest.raises(TrunklineError) as caught:
        call()
    return type(caught.value), str(caught.value)


def test_a_foreign_id_answers_like_an_unknown_one(pair: tuple[TrunkSession, TrunkSession]) -> None:
    alice, bob = pair
    secret = uuid.uuid4().hex
    alice.forward(HIDDEN, ForwardCall(request_id=secret, keep_graph=True))
    alice.forward(HIDDEN, ForwardCall(cache_id=secret))
    alice.add_adapter(f"mine-{secret[:8]}", CONFIG, 1)
    unknown = uuid.uuid4().hex
    foreign = message_of(lambda: bob.backward(HIDDEN, secret))
    assert foreign[0] is UnknownRequestError
    assert foreign[1].replace(secret, "") == message_of(lambda: bob.backward(HIDDEN, unknown))[
        1
    ].replace(unknown, "")
    kind, text = message_of(lambda: bob.adapter(f"mine-{secret[:8]}"))
    assert kind is AdapterError
    assert (
        text.replace(secret[:8], unknown[:8])
        == message_of(lambda: bob.adapter(f"mine-{unknown[:8]}"))[1]
    )
    assert [a.name for a in bob.adapters()] == [""]
    # A cache of the same name is another cache: it begins empty.
    mask = torch.ones(2, 6, dtype=torch.bool)
    bob.forward(HIDDEN, ForwardCall(cache_id=secret, attention_mask=mask))
    bob.release([secret], [secret])
    alice.backward(HIDDEN, secret)


def test_a_foreign_session_cannot_be_resumed(pair: tuple[TrunkSession, TrunkSession]) -> None:
    alice, bob = pair
    resumed = {}
    for name, session_id in (("foreign", alice.session_id), ("unknown", uuid.uuid4().hex)):
        message = pb.Open(resume_session_id=session_id, epoch=7)
        kind, text = message_of(lambda message=message: bob._link._open_at(bob.address, message))
        assert kind is UnknownSessionError
        resumed[name] = text.replace(session_id, "")
    assert resumed["foreign"] == resumed["unknown"]
    alice.forward(HIDDEN, ForwardCall())  # and hers was not disturbed


def test_weights_and_gradients_are_each_their_own(pair: tuple[TrunkSession, TrunkSession]) -> None:
    alice, bob = pair
    before = bob.adapter()
    plain = bob.forward(HIDDEN, ForwardCall()).hidden_BTD
    for step in (1, 2):
        alice.forward(HIDDEN, ForwardCall(request_id=f"{step}", keep_graph=True, step=step))
        alice.backward(HIDDEN, f"{step}")
        assert not bob.gradients()
        alice.step(step, 1.0, adamw(0.1))
    after = bob.adapter()
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert torch.equal(bob.forward(HIDDEN, ForwardCall()).hidden_BTD, plain)
    assert not torch.equal(alice.forward(HIDDEN, ForwardCall()).hidden_BTD, plain)
    assert not bob.optimizer_state()


def test_quotas_are_each_tenants_own(site: Site) -> None:
    with closing(site.open("carol")) as first, closing(site.open("carol")):
        with pytest.raises(ResourceExhaustedError, match="sessions"):
            site.open("carol")
        with pytest.raises(ResourceExhaustedError, match="parameters"):
            first.add_adapter("large", config_to_json(LoraConfig(r=64, target_modules=["c_fc"])), 0)
        held = 0
        with pytest.raises(ResourceExhaustedError, match="held-state") as spent:
            while held < 200:
                first.forward(
                    HIDDEN.repeat(8, 2, 1), ForwardCall(request_id=str(held), keep_graph=True)
                )
                held += 1
        assert spent.value.retry_after_s > 0 and held
        assert not [name for name in ("alice", "bob", "local") if name in str(spent.value)]
        with closing(site.open("bob")) as bob:  # has all of its own
            bob.forward(HIDDEN, ForwardCall(request_id="a", keep_graph=True))
            bob.backward(HIDDEN, "a")
        first.release([str(n) for n in range(held)], [])
        with pytest.raises(ResourceExhaustedError, match="step"):
            for step in range(1, 40):  # one comes back every ten seconds
                first.forward(
                    HIDDEN, ForwardCall(request_id=f"s{step}", keep_graph=True, step=step)
                )
                first.backward(HIDDEN, f"s{step}")
                first.step(step, 1.0, adamw(0.1))


def test_metrics_name_tenants_and_nothing_else(
    site: Site, pair: tuple[TrunkSession, TrunkSession]
) -> None:
    alice, _ = pair
    secret = uuid.uuid4().hex
    alice.forward(HIDDEN, ForwardCall(request_id=secret, keep_graph=True))
    with pytest.raises(UnknownRequestError):
        alice.backward(HIDDEN, f"{secret}-other")
    text = site.metrics()
    assert 'trunkline_sessions{state="attached",tenant="alice"} 1.0' in text
    assert 'trunkline_held_bytes{tenant="alice"}' in text
    assert 'reason="UNKNOWN_REQUEST"' in text
    assert secret not in text and alice.session_id not in text


def test_a_right_that_ends_is_missed_at_the_next_step(site: Site) -> None:
    with closing(site.open("bob")) as bob, closing(site.open("alice")) as alice:
        bob.forward(HIDDEN, ForwardCall(request_id="a", keep_graph=True, step=1))
        bob.backward(HIDDEN, "a")
        site.write_tokens("alice", "carol")
        try:
            with pytest.raises(AuthenticationError):
                bob.step(1, 1.0, adamw(0.1))
            alice.forward(HIDDEN, ForwardCall())
            with pytest.raises(AuthenticationError):
                site.open("bob")
        finally:
            site.write_tokens(*TOKENS)
        bob.step(1, 1.0, adamw(0.1))  # nothing was lost


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
