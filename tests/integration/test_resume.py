"""Broken connections and lost trunks: the client goes on, bitwise as if nothing had happened."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftConfig

import client_service.session
from client_service.calls import ForwardCall, SessionTerms
from client_service.optimizer_spec import adamw
from client_service.random_state import random_facts
from client_service.session import TrunkSession
from client_service.split_model import SplitModelForCausalLM
from client_service.training import TrainingPlan, train
from shared.adapters.config import config_to_json
from shared.errors import (
    ModelMismatchError,
    ResourceExhaustedError,
    StaleSessionError,
    UnknownSessionError,
)
from shared.pb.trunkline.v1 import trunk_pb2 as pb
from tests.conftest import Daemon, start_daemon
from tests.models import VOCAB, save_tiny_model
from tests.patience import PATIENCE_S

HIDDEN = torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(0))
LORA = LoraConfig(
    task_type="CAUSAL_LM",
    r=4,
    target_modules=["c_attn"],
    lora_dropout=0.1,
    fan_in_fan_out=True,
)
TERMS = SessionTerms(peft_config_json=config_to_json(LORA))
STEPS = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("gpt2", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def trunk(trunkd: Callable[..., Daemon], model: Path) -> Daemon:
    return trunkd("--model", str(model), "--threads", "1", "--resume-window-s", str(4 * PATIENCE_S))


@dataclass
class Run:
    losses: list[float]
    trunk_adapter: dict[str, torch.Tensor]
    ends: dict[str, torch.Tensor]
    recoveries: int


def run(
    model: Path,
    address: str,
    meanwhile: Callable[[int, Any], None] = lambda *_: None,
    config: PeftConfig = LORA,
) -> Run:
    """Trains a few steps; ``meanwhile`` is called between them."""
    split = SplitModelForCausalLM.from_pretrained(
        model, address, peft_config=config, seed=1, reconnect_timeout_s=PATIENCE_S
    )
    losses = []
    for metrics in train(split, blocks(), TrainingPlan(steps=STEPS, grad_accum=2)):
        losses.append(metrics.loss)
        meanwhile(metrics.step, split)
    session = split.remote_trunk.session
    ends = {n: p.detach().clone() for n, p in split.named_parameters() if p.requires_grad}
    found = Run(losses, session.adapter(), ends, session.recoveries)
    split.remote_trunk.close()
    return found


def blocks() -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    while True:
        yield torch.randint(0, VOCAB, (2, 8), generator=generator)


@pytest.fixture(scope="module")
def undisturbed(model: Path, trunk: Daemon) -> Run:
    return run(model, trunk.address)


def assert_same_bits(found: Run, expected: Run) -> None:
    assert found.losses == expected.losses
    assert all(torch.equal(found.trunk_adapter[n], t) for n, t in expected.trunk_adapter.items())
    assert all(torch.equal(found.ends[n], t) for n, t in expected.ends.items())


def end(daemon: Daemon) -> None:
    daemon.process.kill()
    daemon.process.wait(timeout=PATIENCE_S)


def break_connection(split: Any) -> None:
    split.remote_trunk.session._link._connection._call.cancel()


def test_a_broken_connection_is_resumed(model: Path, trunk: Daemon, undisturbed: Run) -> None:
    found = run(model, trunk.address, lambda step, split: break_connection(split))
    assert found.recoveries >= STEPS - 1
    assert_same_bits(found, undisturbed)
    resumed = [json.loads(line)["message"] for line in trunk.log().splitlines()]
    assert resumed.count("session resumed") >= STEPS - 1


@pytest.mark.parametrize("journal_bytes", [pytest.param(2**30, marks=pytest.mark.slow), 0])
def test_a_killed_trunk_is_replaced(
    journal_bytes: int,
    model: Path,
    trunk: Daemon,
    undisturbed: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With all requests sent again, and with a snapshot in the place of most."""
    monkeypatch.setattr(client_service.session, "JOURNAL_BYTES", journal_bytes)
    doomed = start_daemon(tmp_path, "--model", str(model), "--threads", "1")

    def kill(step: int, split: Any) -> None:
        if step == 4:
            end(doomed)

    found = run(model, f"{doomed.address},{trunk.address}", kill)
    assert found.recoveries == 1
    assert_same_bits(found, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 4])
def test_adalora_goes_on_on_another_trunk(
    step: int, model: Path, trunk: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a snapshot, which has what its ranks are decided by."""
    monkeypatch.setattr(client_service.session, "JOURNAL_STEPS", 1)
    config = AdaLoraConfig(
        task_type="CAUSAL_LM",
        target_modules=["c_attn"],
        fan_in_fan_out=True,
        init_r=4,
        target_r=2,
        tinit=1,
        tfinal=1,
        deltaT=1,
        total_step=STEPS,
    )
    undisturbed = run(model, trunk.address, config=config)
    doomed = start_daemon(tmp_path, "--model", str(model), "--threads", "1")

    def kill(now: int, split: Any) -> None:
        if now == step:
            end(doomed)

    found = run(model, f"{doomed.address},{trunk.address}", kill, config)
    assert found.recoveries == 1
    assert_same_bits(found, undisturbed)


@pytest.mark.slow
def test_a_generation_outlives_its_trunk(model: Path, trunk: Daemon, tmp_path: Path) -> None:
    prompt = torch.arange(3, 9)[None]
    doomed = start_daemon(tmp_path, "--model", str(model), "--threads", "1")
    outputs = []
    for address in (trunk.address, f"{doomed.address},{trunk.address}"):
        split = SplitModelForCausalLM.from_pretrained(
            model, address, reconnect_timeout_s=PATIENCE_S
        )

        def on_token(*_: Any) -> bool:
            if outputs and doomed.process.poll() is None:
                end(doomed)
            return False

        criteria: Any = [on_token]
        made = split.generate(
            prompt, max_new_tokens=12, do_sample=False, stopping_criteria=criteria
        )
        outputs.append(made)
        split.remote_trunk.close()
    assert doomed.process.poll() is not None
    assert torch.equal(*outputs)


def closed(daemon: Daemon, session_id: str) -> bool:
    entries = map(json.loads, daemon.log().splitlines())
    return any(e["message"] == "session closed" and e["session"] == session_id for e in entries)


def test_a_stale_connection_is_shut_out(trunk: Daemon) -> None:
    session = TrunkSession(trunk.address, TERMS)
    session.forward(HIDDEN, ForwardCall(request_id="a", keep_graph=True, step=1))
    session.backward(HIDDEN, "a")
    link = session._link
    taking = pb.Open(resume_session_id=session.session_id, epoch=link.opened.epoch + 1)
    taken, _, opened = link._open_at(trunk.address, taking)
    assert opened.epoch == 2
    with pytest.raises(StaleSessionError):
        session.step(1, 1.0, adamw(0.1))
    listed = taken.ask(pb.SessionRequest(id=50, list_adapters=pb.ListAdapters()), {}, PATIENCE_S)
    assert listed.message.list_adapters.adapters[0].committed_step == 0
    with pytest.raises(StaleSessionError, match="epoch 2"):
        link._open_at(trunk.address, taking)
    taken.close()
    while not closed(trunk, session.session_id):
        threading.Event().wait(0.02)
    with pytest.raises(UnknownSessionError):  # ended in order, it is gone
        link._open_at(trunk.address, pb.Open(resume_session_id=session.session_id, epoch=9))


def test_an_abandoned_session_is_freed(trunkd: Callable[..., Daemon], model: Path) -> None:
    daemon = trunkd("--model", str(model), "--resume-window-s", "0.2")
    session = TrunkSession(daemon.address, TERMS, reconnect_timeout_s=0)
    session.forward(HIDDEN, ForwardCall(request_id="a", keep_graph=True))
    session._link._connection.abandon()
    pause = threading.Event()
    while "session abandoned" not in daemon.log():
        pause.wait(0.05)
    opened = pb.Open(resume_session_id=session.session_id, epoch=2)
    with pytest.raises(UnknownSessionError):
        session._link._open_at(daemon.address, opened)


def test_a_search_for_a_trunk_draws_nothing_of_the_callers(model: Path, tmp_path: Path) -> None:
    daemon = start_daemon(tmp_path, "--model", str(model), "--threads", "1")
    session = TrunkSession(daemon.address, TERMS, reconnect_timeout_s=1)
    before = random_facts()
    end(daemon)
    with pytest.raises(ConnectionError):
        session.forward(HIDDEN, ForwardCall())
    assert random_facts() == before


@pytest.mark.slow
def test_another_model_is_no_replacement(
    model: Path, trunkd: Callable[..., Daemon], tmp_path: Path
) -> None:
    doomed = start_daemon(tmp_path, "--model", str(model), "--threads", "1")
    other = trunkd()
    addresses = f"{doomed.address},{other.address}"
    session = TrunkSession(addresses, TERMS, reconnect_timeout_s=1)
    end(doomed)
    with pytest.raises((ModelMismatchError, ConnectionError)):
        session.forward(HIDDEN, ForwardCall())


@pytest.mark.parametrize(
    "place",
    [
        pytest.param("forward.before", marks=pytest.mark.slow),
        pytest.param("forward.after", marks=pytest.mark.slow),
        "backward.before",
    ],
)
def test_memory_that_runs_out_costs_one_request(
    place: str, model: Path, trunk: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setenv("TRUNKLINE_FAILPOINTS", f"trunk.{place}=memory")
        flags = ("--model", str(model), "--threads", "1")
        poor = start_daemon(tmp_path, *flags, forked=False)
    found = []
    for address, refused in ((trunk.address, 0), (poor.address, 1)):
        session = TrunkSession(address, TERMS)
        call = ForwardCall(request_id="a", keep_graph=True, training=True, step=1)
        requests: list[Callable[[], Any]] = [
            lambda session=session, call=call: session.forward(HIDDEN, call).hidden_BTD,
            lambda session=session: session.backward(HIDDEN, "a"),
            lambda session=session: session.step(1, 1.0, adamw(0.1)),
        ]
        for request in requests:
            try:
                answer = request()
            except ResourceExhaustedError:
                refused -= 1
                answer = request()
            found.append(answer)
        assert refused == 0
        found.append(session.adapter())
        session.close()
    whole, again = found[:4], found[4:]
    assert torch.equal(whole[0], again[0]) and torch.equal(whole[1][0], again[1][0])
    assert whole[1][1] == again[1][1] and whole[2] == again[2]
    assert all(torch.equal(whole[3][n], again[3][n]) for n in whole[3])
    poor.process.terminate()
    assert poor.process.wait(timeout=PATIENCE_S) == 0
