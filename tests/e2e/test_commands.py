"""The installed commands as a person runs them, on a real daemon."""

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
from peft import PeftModel
from transformers import AutoModelForCausalLM

from client_service.calls import ForwardCall, SessionTerms
from client_service.session import TrunkSession
from shared.bundled import model_dir, private_train_file
from shared.errors import TrunkUnavailableError
from tests.conftest import Daemon, start_daemon
from tests.patience import PATIENCE_S

pytestmark = pytest.mark.e2e

BIN = Path(sys.executable).parent


def trunkline(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(BIN / "trunkline"), *arguments], capture_output=True, text=True, timeout=PATIENCE_S
    )


@pytest.mark.slow
def test_train_eval_generate_and_load_with_plain_peft(
    trunkd: Callable[..., Daemon], tmp_path: Path
) -> None:
    address = trunkd().address
    out = tmp_path / "run"
    data = tmp_path / "notes.jsonl"
    lines = private_train_file().read_text(encoding="utf-8").splitlines()[:300]
    data.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    arguments = ["--steps", "12", "--batch-size", "4", "--seq-len", "64", "--lr", "5e-3"]
    arguments += ["--grad-accum", "2", "--grad-clip", "0.5", "--dropout", "0.05", "--seed", "3"]
    trained = trunkline(
        "train", "--trunk", address, "--data", str(data), "--out", str(out), *arguments
    )
    assert trained.returncode == 0, trained.stderr
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics] == list(range(1, 13))
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert metrics[0].keys() == {
        "step",
        "loss",
        "grad_norm",
        "lr",
        "tokens",
        "bytes_sent",
        "bytes_received",
        "seconds",
    }
    hidden_bytes = 2 * 4 * 64 * 128 * 4  # two batches of float32 hidden states
    assert all(m["tokens"] == 512 and m["bytes_sent"] > 2 * hidden_bytes for m in metrics)
    scored = trunkline("eval", "--trunk", address, "--adapter", str(out / "adapter"))
    assert json.loads(scored.stdout)["perplexity"] > 1
    said = trunkline("generate", "--trunk", address, "--prompt", "Once there was")
    assert said.stdout.startswith("Once there was") and len(said.stdout) > 40
    base = AutoModelForCausalLM.from_pretrained(model_dir(), dtype=torch.float32)
    assert isinstance(PeftModel.from_pretrained(base, out / "adapter"), PeftModel)


@pytest.mark.slow
def test_verify_says_what_differs(trunkd: Callable[..., Daemon]) -> None:
    done = trunkline("verify", "--trunk", trunkd().address, "--steps", "5")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["max_abs_loss_diff"] <= 1e-5
    assert found["max_abs_grad_diff"] <= 1e-5
    assert found["max_abs_adapter_diff"] <= 1e-4
    assert found["max_abs_grad_norm_diff"] <= 1e-4


@pytest.mark.slow
def test_split_serves_and_info_says_so(trunkd: Callable[..., Daemon], tmp_path: Path) -> None:
    done = trunkline("split", "--split", "3:9", "--out", str(tmp_path / "parts"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "parts/bottom/gpt2_3-9_bottom.safetensors").is_file()
    assert (tmp_path / "parts/top/gpt2_3-9_top_metadata.json").is_file()
    daemon = trunkd("--model", str(tmp_path / "parts"), "--split", "3:9")
    info = json.loads(trunkline("info", "--trunk", daemon.address).stdout)
    assert (info["start_layer"], info["end_layer"]) == (3, 9)
    assert info["weight_digest"] == daemon.ready["weight_digest"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "--out", "x", "--trunk", "127.0.0.1:1"], "127.0.0.1:1"),
        pytest.param(
            ["train", "--out", "x", "--data", "missing.txt"], "missing.txt", marks=pytest.mark.slow
        ),
        pytest.param(
            ["train", "--out", "x", "--data", "empty.txt"], "is empty", marks=pytest.mark.slow
        ),
        pytest.param(
            ["train", "--out", "x", "--data", "binary.txt"], "not text", marks=pytest.mark.slow
        ),
        (["train", "--out", "x", "--peft", "magic"], "accepted: lora, dora"),
        pytest.param(
            ["train", "--out", "x", "--model", "./nowhere"],
            "no such model folder",
            marks=pytest.mark.slow,
        ),
        (["split", "--out", "x", "--split", "2:99"], "12 blocks"),
    ],
)
def test_a_mistake_is_named(arguments: list[str], said: str, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)))
    named = [str(tmp_path / a) if a.endswith(".txt") or a == "x" else a for a in arguments]
    done = trunkline(*named)
    assert done.returncode == 2
    assert said in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--split", "2:99"], "12 blocks"),
        pytest.param(["--model", "./nowhere"], "no such model folder", marks=pytest.mark.slow),
        pytest.param(["--listen", "127.0.0.1:99999"], "HOST:PORT", marks=pytest.mark.slow),
        (["--device", "abacus"], "abacus"),
    ],
)
def test_a_daemon_that_cannot_start_says_why(flags: list[str], said: str) -> None:
    done = subprocess.run(
        [str(BIN / "trunkd"), *flags], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 2
    assert said in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_run_with_every_way_to_be_faster(trunkd: Callable[..., Daemon], tmp_path: Path) -> None:
    """Close to the plain run, for a third of its bytes; it resumes with the options it had."""
    common = ["--trunk", trunkd().address, "--steps", "4", "--batch-size", "4", "--seq-len", "64"]
    common += ["--seed", "1"]
    plain, fast = tmp_path / "plain", tmp_path / "fast"
    options = ["--micro-batches", "2", "--wire-format", "int8", "--max-wire-drift", "0.05"]
    options += ["--adapter-wire-format", "int8"]
    for out, more in ((plain, []), (fast, [*options, "--fused-loss"])):
        done = trunkline("train", "--out", str(out), *common, *more)
        assert done.returncode == 0, done.stderr
    rows = [
        [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        for out in (plain, fast)
    ]
    for exact, lossy in zip(*rows, strict=True):
        assert lossy["loss"] == pytest.approx(exact["loss"], rel=5e-3)
        if lossy["step"] > 1:  # which compares itself with float32
            assert lossy["bytes_sent"] < exact["bytes_sent"] / 3
    settings = json.loads((fast / "run.json").read_text())["arguments"]
    assert settings["wire_format"] == "int8" and settings["micro_batches"] == 2


def bench(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [str(BIN / "trunkline"), "bench", "--help"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=PATIENCE_S)


@pytest.mark.slow
def test_bench_says_what_it_measures() -> None:
    here = bench(Path(__file__).parents[2])
    assert here.returncode == 0 and "decoding" in here.stdout


def test_bench_needs_a_checkout(tmp_path: Path) -> None:
    there = bench(tmp_path)
    assert there.returncode == 2 and "in a checkout" in there.stderr


def test_sigterm_drains_and_exits_clean(tmp_path: Path) -> None:
    daemon = start_daemon(tmp_path, "--drain-timeout-s", "5", forked=False)
    with grpc.insecure_channel(daemon.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service="trunkline.v1.TrunkService")
        assert health.Check(request).status == health_pb2.HealthCheckResponse.SERVING
    session = TrunkSession(daemon.address, SessionTerms(), reconnect_timeout_s=0)
    daemon.process.send_signal(signal.SIGTERM)
    assert daemon.process.wait(timeout=PATIENCE_S) == 0
    with pytest.raises(TrunkUnavailableError):
        session.forward(torch.zeros(1, 2, 128), ForwardCall())
    session.close()
    entries = [json.loads(line) for line in daemon.log().splitlines()]
    assert [e["message"] for e in entries] == [
        "serving",
        "session opened",
        "draining",
        "session closed",
        "stopped",
    ]


def test_a_port_serves_one_daemon(trunkd: Callable[..., Daemon]) -> None:
    taken = trunkd().address
    done = subprocess.run(
        [str(BIN / "trunkd"), "--listen", taken], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 2 and taken in done.stderr


@pytest.mark.slow
def test_a_silent_session_is_freed(tmp_path: Path) -> None:
    daemon = start_daemon(tmp_path, "--session-lease-s", "0.5", forked=False)
    session = TrunkSession(daemon.address, SessionTerms(), reconnect_timeout_s=0)
    session._link._connection._reader.join(
        timeout=PATIENCE_S
    )  # ends when the trunk ends the stream
    with pytest.raises(TrunkUnavailableError, match="lease"):
        session.forward(torch.zeros(1, 2, 128), ForwardCall())
    session.close()
    daemon.process.terminate()
    assert daemon.process.wait(timeout=PATIENCE_S) == 0
