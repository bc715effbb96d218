"""Broken connections and lost trunks: the client goes on, bitwise as if nothing had happened."""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from client_service import SplitModelForCausalLM
from client_service.calls import ForwardCall, SessionTerms
from client_service.dropout_key import SECRET_VARIABLE
from client_service.random_state import random_facts
from client_service.session import TrunkSession
from client_service.training import TrainingPlan, train
from client_service.whole import largest_difference, load_whole, trained_weights
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
TERMS = SessionTerms()
STEPS = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("gpt2", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def trunk(trunkd: Callable[..., Daemon], model: Path) -> Daemon:
    return trunkd("--model", str(model), "--threads", "1", "--resume-window-s", str(4 * PATIENCE_S))


@pytest.fixture(autouse=True)
def secret(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for all runs, so that their dropout is."""
    folder = tmp_path_factory.getbasetemp()
    monkeypatch.setenv(SECRET_VARIABLE, str(folder / "dropout_secret"))


def lora(dropout: float) -> LoraConfig:
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        target_modules=["c_attn"],
        lora_dropout=dropout,
        fan_in_fan_out=True,
    )


@dataclass
class Run:
    losses: list[float]
    weights: dict[str, torch.Tensor]
    recoveries: int


def run(
    model: Path,
    address: str,
    meanwhile: Callable[[int, Any], None] = lambda *_: None,
    dropout: float = 0.1,
    micro_batches: int = 4,
) -> Run:
    """Trains a few steps; ``meanwhile`` is called with all micro-batches on their way."""
    split = SplitModelForCausalLM.from_pretrained(
        model,
        address,
        peft_config=lora(dropout),
        seed=1,
        dropout=dropout,
        reconnect_timeout_s=PATIENCE_S,
    )
    session = split.remote_trunk.session
    step, called = 1, 0

    def in_the_middle(*_: Any) -> None:
        nonlocal called
        if called < step:  # once a step
            called = step
            meanwhile(step, session)

    split.get_output_embeddings().register_forward_hook(in_the_middle)
    plan = TrainingPlan(steps=STEPS, grad_accum=2, micro_batches=micro_batches)
    losses = []
    for metrics in train(split, blocks(), plan):
        losses.append(metrics.loss)
        step = metrics.step + 1
    found = Run(losses, trained_weights(split), session.recoveries)
    split.remote_trunk.close()
    return found


def blocks() -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    while True:
        yield torch.randint(0, VOCAB, (4, 8), generator=generator)


@pytest.fixture(scope="module")
def undisturbed(trunkd: Callable[..., Daemon], model: Path, trunk: Daemon) -> Callable[[], Run]:
    """Of the first test that asks, with the secret that is set by then."""
    return functools.cache(lambda: run(model, trunk.address))


def assert_same_bits(found: Run, expected: Run) -> None:
    assert found.losses == expected.losses
    assert largest_difference(found.weights, expected.weights) == 0


def end(daemon: Daemon) -> None:
    daemon.process.kill()
    daemon.process.wait(timeout=PATIENCE_S)


def break_connection(step: int, session: TrunkSession) -> None:
    session._link._connection._call.cancel()


def test_a_broken_connection_is_resumed(
    model: Path, trunk: Daemon, undisturbed: Callable[[], Run]
) -> None:
    found = run(model, trunk.address, break_connection)
    assert found.recoveries >= STEPS - 1
    assert_same_bits(found, undisturbed())
    resumed = [json.loads(line)["message"] for line in trunk.log().splitlines()]
    assert resumed.count("session resumed") >= STEPS - 1


def test_a_killed_trunk_is_replaced(
    model: Path, trunk: Daemon, undisturbed: Callable[[], Run], tmp_path: Path
) -> None:
    doomed = start_daemon(tmp_path, "--model", str(model), "--threads", "1")

    def kill(step: int, session: TrunkSession) -> None:
        if step == 4:
            end(doomed)

    found = run(model, f"{doomed.address},{trunk.address}", kill)
    assert found.recoveries == 1
    assert_same_bits(found, undisturbed())


def test_losses_of_a_line_change_nothing_of_the_whole_model_s_training(
    model: Path, trunk: Daemon
) -> None:
    found = run(model, trunk.address, break_connection, dropout=0.0, micro_batches=1)
    torch.manual_seed(1)
    whole = get_peft_model(load_whole(model), lora(0.0))
    plan = TrainingPlan(steps=STEPS, grad_accum=2)
    assert [metrics.loss for metrics in train(whole, blocks(), plan)] == found.losses
    assert largest_difference(trained_weights(whole), found.weights) == 0


def closed(daemon: Daemon, session_id: str) -> bool:
    entries = map(json.loads, daemon.log().splitlines())
    return any(e["message"] == "session closed" and e["session"] == session_id for e in entries)


def test_a_stale_connection_is_shut_out(trunk: Daemon) -> None:
    session = TrunkSession(trunk.address, TERMS)
    session.forward(HIDDEN, ForwardCall(request_id="a", keep_graph=True))
    link = session._link
    taking = pb.Open(resume_session_id=session.session_id, epoch=link.opened.epoch + 1)
    taken, _, opened = link._open_at(trunk.address, taking)
    assert opened.epoch == 2
    with pytest.raises(StaleSessionError):
        backward(session)
    with pytest.raises(StaleSessionError, match="epoch 2"):
        link._open_at(trunk.address, taking)
    taken.close()
    while not closed(trunk, session.session_id):
        threading.Event().wait(0.02)
    with pytest.raises(UnknownSessionError):  # ended in order, it is gone
        link._open_at(trunk.address, pb.Open(resume_session_id=session.session_id, epoch=9))


def backward(session: TrunkSession) -> torch.Tensor:
    found, _, _ = session.backward(HIDDEN, "a", True, [], [], False)
    assert found is not None
    return found


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
    found: list[torch.Tensor] = []
    for address, refused in ((trunk.address, 0), (poor.address, 1)):
        session = TrunkSession(address, TERMS)
        call = ForwardCall(request_id="a", keep_graph=True, training=True)
        requests: list[Callable[[], torch.Tensor]] = [
            lambda session=session, call=call: session.forward(HIDDEN, call),
            lambda session=session: backward(session),
        ]
        for request in requests:
            try:
                answer = request()
            except ResourceExhaustedError:
                refused -= 1
                answer = request()
            found.append(answer)
        assert refused == 0
        session.close()
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])
    poor.process.terminate()
    assert poor.process.wait(timeout=PATIENCE_S) == 0
