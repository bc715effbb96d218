"""``trunkline train --resume``: killed anywhere, a run goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared.bundled import private_train_file
from shared.failpoints import VARIABLE
from tests.conftest import Daemon
from tests.integration.test_checkpoints import tensor_file
from tests.patience import PATIENCE_S

pytestmark = pytest.mark.e2e

TRUNKLINE = Path(sys.executable).parent / "trunkline"
STEPS = 6


def trunkline(*arguments: object, failpoint: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(TRUNKLINE), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env={**os.environ, VARIABLE: failpoint},
    )


def arguments(data: Path) -> list[object]:
    found: list[object] = ["--data", data, "--steps", STEPS, "--batch-size", 2, "--seq-len", 32]
    found += ["--dropout", 0.1, "--lr-schedule", "cosine", "--grad-accum", 2]
    return [*found, "--checkpoint-every", 2, "--threads", 1, "--seed", 5]


def metrics(out: Path) -> list[tuple[Any, ...]]:
    """Of every step, what does not depend on the connection and the clock."""
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [tuple(m[k] for k in ("step", "loss", "grad_norm", "lr", "tokens")) for m in lines]


def adapter(out: Path) -> tuple[Any, bytes]:
    return tensor_file(out / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "notes.txt"
    path.write_text(private_train_file().read_text(encoding="utf-8")[:4000])
    return path


@pytest.fixture(scope="module")
def whole(
    trunkd: Callable[..., Daemon], data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The undisturbed run."""
    out = tmp_path_factory.mktemp("whole")
    done = trunkline("train", "--out", out, "--trunk", trunkd().address, *arguments(data))
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    "failpoint",
    [
        "client.checkpoint.rename=kill@2",
        "client.checkpoint.file=kill@12",
        "client.checkpoint.after=kill@2",
        "client.optimizer.after=kill@4",
        "client.step.before=kill@1",
    ],
)
def test_a_killed_run_goes_on_to_the_very_same_adapter(
    failpoint: str, whole: Path, trunkd: Callable[..., Daemon], data: Path, tmp_path: Path
) -> None:
    out, trunk = tmp_path / "run", ["--trunk", trunkd().address]
    killed = trunkline("train", "--out", out, *trunk, *arguments(data), failpoint=failpoint)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    with (out / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 5, "lo')
    resumed = trunkline("train", "--resume", "--out", out)
    assert resumed.returncode == 0, resumed.stderr
    assert metrics(out) == metrics(whole)
    assert adapter(out) == adapter(whole)
    assert not list(out.rglob(".*"))
    left = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert left == ["step-00000004", "step-00000006"]


@pytest.mark.slow
def test_a_run_is_resumed_with_its_own_options(
    trunkd: Callable[..., Daemon], data: Path, tmp_path: Path
) -> None:
    out, trunk = tmp_path / "run", ["--trunk", trunkd().address]
    nothing = trunkline("train", "--resume", "--out", out)
    assert nothing.returncode == 2 and "run.json: no such file" in nothing.stderr
    full = trunkline(
        "train", "--out", out, *trunk, *arguments(data), failpoint="client.checkpoint.file=enospc@5"
    )
    assert full.returncode == 2 and "Traceback" not in full.stderr
    assert "step-00000002: was not saved" in full.stderr and "no checkpoint before" in full.stderr
    assert [step for step, *_ in metrics(out)] == [1, 2]
    # No checkpoint yet: it starts from the beginning.
    resumed = trunkline("train", "--resume", "--out", out)
    assert resumed.returncode == 0, resumed.stderr
    trained, lines = adapter(out), metrics(out)
    assert [step for step, *_ in lines] == [1, 2, 3, 4, 5, 6]
    again = trunkline("train", "--out", out, *trunk, *arguments(data))
    assert again.returncode == 2 and "give --resume" in again.stderr
    other = trunkline("train", "--resume", "--out", out, "--steps", STEPS, "--lr", 0.5)
    assert other.returncode == 2 and "--lr 0.5: this run began with 0.001" in other.stderr
    (out / "adapter" / "adapter_model.safetensors").unlink()
    complete = trunkline("train", "--resume", "--out", out, "--threads", 2, *trunk)
    assert complete.returncode == 0 and "run is complete" in complete.stderr
    assert adapter(out) == trained and metrics(out) == lines
    run = (out / "run.json").read_text()
    (out / "run.json").write_text(run.replace('"data_sha256": "', '"data_sha256": "0'))
    changed = trunkline("train", "--resume", "--out", out)
    assert changed.returncode == 2 and "has changed since this run" in changed.stderr
