"""``OUT/run.json``: how a run of ``trunkline train`` began, so that ``--resume`` needs no more."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import TypeAdapter, ValidationError

from client_service.atomic_folder import replace_file
from client_service.dropout_key import SECRET_VARIABLE, fingerprint, user_secret
from shared.errors import CheckpointError, DataError
from shared.models.tensor_files import first_line
from shared.tensor_bytes import as_bytes

FORMAT = 1
RUN_FILE, METRICS_FILE = "run.json", "metrics.jsonl"

# Where and how fast it goes on, not what it computes.
_FREE = ("trunk", "threads", "chat")


@dataclass(frozen=True)
class RunSettings:
    """The options of ``trunkline train``; its ``--help`` says what they are."""

    model: str
    trunk: str
    data: Path | None
    steps: int
    batch_size: int
    seq_len: int
    lr: float
    seed: int | None
    optimizer: Literal["adamw", "sgd", "adafactor"]
    peft: str
    peft_config: Path | None
    peft_parts: Literal["all", "bottom", "trunk", "top", "ends"]
    trunk_peft: Literal["same", "none"]
    adapter: Path | None
    dropout: float
    grad_clip: float
    grad_accum: int
    lr_schedule: Literal["constant", "constant_with_warmup", "linear", "cosine"]
    warmup_steps: int
    checkpoint_every: int
    keep_last: int
    reconnect_timeout: float
    chat: bool
    quantize: str
    threads: int
    # Runs that began before there was a choice have none of these.
    fused_loss: bool = False
    onednn: bool = False
    micro_batches: int = 1
    wire_format: str = "float32"
    gradient_wire_format: str | None = None
    adapter_wire_format: str = "float32"
    max_wire_drift: float | None = None

    def anywhere(self) -> RunSettings:
        """The same settings with paths that mean the same in another working directory."""
        paths = {"data": self.data, "peft_config": self.peft_config, "adapter": self.adapter}
        changed: dict[str, Any] = {n: p.absolute() for n, p in paths.items() if p is not None}
        if self.model and Path(self.model).is_dir():  # else a hub id, or the bundled one
            changed["model"] = str(Path(self.model).absolute())
        return replace(self, **changed)


def write_run(out: Path, settings: RunSettings, blocks_NT: torch.Tensor) -> None:
    """Notes how a run begins.

    Args:
        out: Folder of the run.
        settings: Of the run.
        blocks_NT: Its data.

    Raises:
        CheckpointError: If the disk refuses.
    """
    run = {
        "format": FORMAT,
        "arguments": asdict(settings),
        "data_sha256": _digest(blocks_NT),
        "dropout_secret": _secret_of(settings),
    }
    put_file(out / RUN_FILE, json.dumps(run, indent=2, default=str).encode())


def resumed_settings(out: Path, given: RunSettings, named: Iterable[str]) -> RunSettings:
    """The settings with which a run in a folder goes on.

    Args:
        out: Folder of the run.
        given: Of this command, defaults included.
        named: Which of them were written on the command line.

    Raises:
        CheckpointError: If no run began there, or an option is not that of the run.
    """
    path = out / RUN_FILE
    try:
        began = TypeAdapter(RunSettings).validate_python(_read(path)["arguments"])
    except (ValidationError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: is not of a run ({first_line(error)})") from error
    for name in (n for n in named if n not in _FREE):
        ours, theirs = getattr(given.anywhere(), name), getattr(began, name)
        if ours != theirs:
            raise CheckpointError(
                f"--{name.replace('_', '-')} {ours}: this run began with {theirs}; with --resume, "
                f"only --{', --'.join(_FREE)} may be others"
            )
    return replace(began, **{n: getattr(given, n) for n in named if n in _FREE})


def check_same_data(out: Path, blocks_NT: torch.Tensor) -> None:
    """Refuses to go on with other data.

    Args:
        out: Folder of the run.
        blocks_NT: The data as it is now.

    Raises:
        DataError: If it is not what the run began with.
    """
    if _read(out / RUN_FILE).get("data_sha256") != _digest(blocks_NT):
        raise DataError(f"{out / RUN_FILE}: the data or the tokenizer has changed since this run")


def check_same_secret(out: Path, settings: RunSettings) -> None:
    """Refuses to go on with dropout of another secret, whose masks would be others.

    Args:
        out: Folder of the run.
        settings: Of the run.

    Raises:
        CheckpointError: If it is not that of the run.
    """
    began, now = _read(out / RUN_FILE).get("dropout_secret"), _secret_of(settings)
    if began != now:
        raise CheckpointError(
            f"{out / RUN_FILE}: dropout of this run began under the secret {began}, here is {now}; "
            f"name its file in {SECRET_VARIABLE}"
        )


def cut_metrics(out: Path, step: int) -> None:
    """Leaves the metrics of the steps that are done; what follows them is done again.

    Args:
        out: Folder of the run.
        step: The last that is done.

    Raises:
        CheckpointError: If the disk refuses.
    """
    path = out / METRICS_FILE
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    kept = [line for line in lines if 0 < _step_of(line) <= step]
    put_file(path, b"".join(kept))


def _step_of(line: bytes) -> int:
    """The step of a line; 0 of one that a killed process has not finished."""
    if not line.endswith(b"\n"):
        return 0
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 0


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; --resume goes on with a run") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable ({first_line(error)})") from error


def put_file(path: Path, data: bytes) -> None:
    """Writes a file of a run, whole or not at all; its folder is made if needed.

    Raises:
        CheckpointError: If the disk refuses; a file that was there is as it was.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, data)
    except OSError as error:
        raise CheckpointError(f"{path}: was not written ({first_line(error)})") from error


def _secret_of(settings: RunSettings) -> str | None:
    """The fingerprint of the secret of dropout masks, where there are any."""
    return fingerprint(user_secret()) if settings.dropout else None


def _digest(blocks_NT: torch.Tensor) -> str:
    return hashlib.sha256(as_bytes(blocks_NT)).hexdigest()
