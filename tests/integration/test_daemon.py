"""A daemon over its life: leases, draining, models it cannot serve, what it logs."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from peft import LoraConfig

from client_service.calls import ForwardCall, SessionTerms
from client_service.session import TrunkSession
from shared.errors import DrainingError, TrunkUnavailableError, UnknownRequestError
from tests.by_hand import ByHand
from tests.conftest import Daemon, start_daemon
from tests.models import save_tiny_model
from tests.patience import PATIENCE_S

HIDDEN = torch.randn(2, 6, 128, generator=torch.Generator().manual_seed(0))
HELD = ForwardCall(request_id="a", keep_graph=True, training=True)
LORA = LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)
DRAIN_TIMEOUT_S = str(4 * PATIENCE_S)  # who drains as long is found hanging before


def drain(daemon: Daemon) -> None:
    """Sends SIGTERM and waits until the daemon says that it takes no new work."""
    with grpc.insecure_channel(daemon.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        states = health.Watch(health_pb2.HealthCheckRequest(service="trunkline.v1.TrunkService"))
        assert next(states).status == health_pb2.HealthCheckResponse.SERVING
        daemon.process.send_signal(signal.SIGTERM)
        assert next(states).status == health_pb2.HealthCheckResponse.NOT_SERVING
        states.cancel()


def check_health(daemon: Daemon) -> None:
    """Of a daemon that drains, and does not end before it is let."""
    with grpc.insecure_channel(daemon.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service, expected in (
            ("readiness", "NOT_SERVING"),
            ("liveness", "SERVING"),
            ("", "SERVING"),
        ):
            status = health.Check(health_pb2.HealthCheckRequest(service=service)).status
            assert health_pb2.HealthCheckResponse.ServingStatus.Name(status) == expected


def test_the_ready_file_says_what_is_served(bundled_trunk: Daemon) -> None:
    ready = bundled_trunk.ready
    assert set(ready) == {"address", "pid", "model_type", "split", "weight_digest"}
    assert ready["pid"] == bundled_trunk.process.pid
    session = TrunkSession(
        ready["address"], SessionTerms(split=(2, 10), weight_digest=ready["weight_digest"])
    )
    assert (session.info.model_type, "2:10") == (ready["model_type"], ready["split"])
    session.close()


def test_draining_lets_open_forwards_finish_and_takes_nothing_new(tmp_path: Path) -> None:
    daemon = start_daemon(tmp_path, "--drain-timeout-s", DRAIN_TIMEOUT_S, forked=False)
    session = TrunkSession(daemon.address, SessionTerms(), reconnect_timeout_s=0)
    for name in "ab":
        session.forward(HIDDEN, ForwardCall(request_id=name, keep_graph=True))
    drain(daemon)
    check_health(daemon)
    with pytest.raises(DrainingError, match="no new forward"):
        session.forward(HIDDEN, ForwardCall())
    with pytest.raises(TrunkUnavailableError):
        TrunkSession(daemon.address, SessionTerms())
    session.release(["a"], [])
    check_health(daemon)
    given, _, _ = session.backward(HIDDEN, "b", True, [], [], False)
    assert given is not None and given.abs().max() > 0
    try:
        assert daemon.process.wait(timeout=PATIENCE_S) == 0
    finally:
        session.close()
        assert daemon.process.wait(timeout=PATIENCE_S) == 0


def test_a_forward_without_a_backward_expires(trunkd: Callable[..., Daemon]) -> None:
    daemon = trunkd("--held-lease-s", "0.2")
    session = TrunkSession(daemon.address, SessionTerms())
    watcher = TrunkSession(daemon.address, SessionTerms())
    session.forward(HIDDEN, HELD)
    while "held state expired" not in daemon.log():
        watcher.forward(HIDDEN, ForwardCall())
    with pytest.raises(UnknownRequestError, match="expired"):
        session.backward(HIDDEN, "a", True, [], [], False)
    found, expected = (s.forward(HIDDEN, ForwardCall()) for s in (session, watcher))
    assert torch.equal(found, expected)
    session.close()
    watcher.close()


def test_released_forwards_give_their_room_back(trunkd: Callable[..., Daemon]) -> None:
    daemon = trunkd("--session-held-bytes", str(HIDDEN.nbytes))
    session = TrunkSession(daemon.address, SessionTerms())
    for number in range(8):
        session.forward(HIDDEN, ForwardCall(request_id=str(number), keep_graph=True))
        session.release([str(number), "never sent"], ["no cache"])
    session.close()


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        ("truncated", "model.safetensors"),
        pytest.param("bert", "'bert' cannot be split; accepted: gpt2", marks=pytest.mark.slow),
        pytest.param("no weights", "no weights", marks=pytest.mark.slow),
        pytest.param("config is no JSON", "not readable as JSON", marks=pytest.mark.slow),
        ("too few blocks", "h.9."),
        pytest.param("narrower blocks", "has shape", marks=pytest.mark.slow),
    ],
)
def test_a_model_it_cannot_serve_is_named(harm: str, said: str, tmp_path: Path) -> None:
    folder = save_tiny_model("gpt2", tmp_path / "model")
    weights, config = folder / "model.safetensors", folder / "config.json"
    fields = json.loads(config.read_text())
    match harm:
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "bert":
            config.write_text('{"model_type": "bert"}')
        case "no weights":
            weights.unlink()
        case "config is no JSON":
            config.write_text("{")
        case "too few blocks":
            save_tiny_model("gpt2", folder, n_layer=9)
            config.write_text(json.dumps(fields))
        case "narrower blocks":
            config.write_text(json.dumps(fields | {"n_embd": 128}))
    done = subprocess.run(
        [sys.executable, "-m", "trunk_service", "--model", str(folder), "--listen", "127.0.0.1:0"],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 2
    assert said in done.stderr and "Traceback" not in done.stderr


def test_logs_are_json_lines_without_values(tmp_path: Path) -> None:
    daemon = start_daemon(tmp_path, "--log-level", "debug")
    tenant = ByHand(daemon.address, LORA)
    marked = torch.full((1, 2, 128), 1234.5)
    with torch.no_grad():
        tenant.client.parameters()[0].fill_(1234.5)
    tenant.client.compute(marked)
    tenant.forward(marked, request_id="mine", keep_graph=True, training=True)
    with pytest.raises(UnknownRequestError):
        tenant.backward(marked, "another")
    tenant.backward(marked, "mine")
    tenant.close()
    daemon.process.terminate()
    assert daemon.process.wait(timeout=PATIENCE_S) == 0
    entries = [json.loads(line) for line in daemon.log().splitlines()]
    assert all({"time", "level", "logger", "message"} <= entry.keys() for entry in entries)
    refused = next(entry for entry in entries if "refused" in entry["message"])
    assert (refused["session"], refused["request"]) == (tenant.session.session_id, "another")
    assert "1234.5" not in daemon.log() and "tensor(" not in daemon.log()
