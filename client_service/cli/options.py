"""Options and set-up that several commands share."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from peft import PeftConfig
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from client_service.peft_defaults import default_config
from shared.adapters.config import config_from_json
from shared.bundled import model_dir
from shared.errors import AdapterError, CheckpointError
from shared.models import open_checkpoint
from shared.models.tensor_files import first_line

ModelOption = Annotated[
    str, typer.Option(help="Model folder (whole or split) or hub id; default: the bundled model.")
]
TrunkOption = Annotated[
    str, typer.Option(help="HOST:PORT of the trunk; several with commas are tried in turn.")
]
SeedOption = Annotated[int, typer.Option(help="Fixes adapters, data order and dropout.")]
AdapterOption = Annotated[
    Path | None, typer.Option(help="Folder of a PEFT adapter of the whole model to start from.")
]
ThreadsOption = Annotated[int, typer.Option(help="Torch threads of this process; 0: all cores.")]
SeqLenOption = Annotated[int, typer.Option(help="Tokens of one block.", min=2)]
BatchSizeOption = Annotated[int, typer.Option(help="Blocks of one batch.", min=1)]

PeftOption = Annotated[
    str, typer.Option(help="lora, dora, rslora, adalora, ia3, prefix, prompt or p-tuning.")
]
PeftConfigOption = Annotated[
    Path | None, typer.Option(help="JSON of a PEFT configuration, instead of --peft.")
]
PeftPartsOption = Annotated[
    Literal["all", "bottom", "trunk", "top", "ends"], typer.Option(help="What --peft adapts.")
]
QuantizeOption = Annotated[
    str, typer.Option(help="Hold the ends' base weights in nf4 or int8; the trunk decides its own.")
]
WireFormatOption = Annotated[
    str,
    typer.Option(help="How hidden states and gradients travel: float32, bfloat16, float16, int8."),
]
OneDnnOption = Annotated[
    bool,
    typer.Option("--onednn", help="Let oneDNN compute frozen linear layers: faster on AMD CPUs."),
]

DEFAULT_TRUNK = "localhost:50052"


def prepare(threads: int) -> None:
    """Sets this process's threads and quiets the libraries."""
    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    # PEFT asks transformers by a name that it is about to drop; nobody here can mend that.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)


def model_or_bundled(model: str) -> str:
    """The model that was named, or the bundled one."""
    return model or str(model_dir())


def load_tokenizer(model: str) -> Any:
    """The model's tokenizer.

    Raises:
        CheckpointError: If there is no such model, or it has no tokenizer.
    """
    folder = open_checkpoint(model).folder
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{model}: no tokenizer there ({first_line(error)})") from error


def read_peft_config(
    method: str, file: Path | None, model: str, dropout: float, steps: int
) -> PeftConfig:
    """The configuration of ``--peft-config``, or a default one of the method ``--peft``.

    Raises:
        AdapterError: If the file is unreadable or the method unknown.
    """
    if file is None:
        return default_config(method, open_checkpoint(model).family, dropout, steps)
    if not file.is_file():
        raise AdapterError(f"{file}: no such file")
    return config_from_json(file.read_text(encoding="utf-8"))


def show(facts: dict[str, Any]) -> None:
    """Prints JSON to standard output."""
    typer.echo(json.dumps(facts, indent=2))
