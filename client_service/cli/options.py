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

from client_service.adapter_files import config_from_json, read_adapter
from client_service.addresses import checked_addresses
from client_service.data import read_texts, token_blocks
from client_service.model_limits import check_block_length, check_vocabulary, virtual_tokens
from client_service.peft_defaults import check_method, default_config
from shared.bundled import model_dir
from shared.errors import AdapterError, CheckpointError, DataError, InvalidInputError
from shared.models import open_checkpoint
from shared.models.quantization import check_kind
from shared.models.tensor_files import first_line
from shared.wire.formats import WireFormat

MOST = 2**31 - 1
"""Of what is counted."""
_MOST_THREADS = 1024
SEEDS = 2**64  # what torch takes


def given_path(value: str | Path) -> Path:
    """A path as it was written; of an empty one Python would make the present folder."""
    if not str(value):
        raise ValueError("is empty; accepted is a path")
    return Path(value)


def _check_model(context: typer.Context, value: str) -> str:
    source = context.get_parameter_source("model")
    if not value and source is not None and source.name == "COMMANDLINE":
        raise InvalidInputError("--model is empty; leave it out for the bundled model")
    return value


def _check_peft(value: str) -> str:
    check_method(value)
    return value


def _check_quantize(value: str) -> str:
    if value:
        check_kind(value)
    return value


def _check_wire_format(value: str | None) -> str | None:
    if value is not None:
        WireFormat.named(value)
    return value


def _check_wire_drift(value: float | None) -> float | None:
    if value is not None and not value > 0:
        raise InvalidInputError(f"--max-wire-drift {value}: accepted is a number above 0")
    return value


def _check_temperature(value: float) -> float:
    # Logits are divided by it, and the quotients must be finite in float32.
    if value != 0 and not 1e-30 <= value <= 1e30:
        raise InvalidInputError(f"--temperature {value}: accepted are 0 and 1e-30 to 1e30")
    return value


ModelOption = Annotated[
    str,
    typer.Option(
        help="Model folder (whole or split) or hub id; default: the bundled model.",
        callback=_check_model,
    ),
]
TrunkOption = Annotated[
    str,
    typer.Option(
        help="HOST:PORT of the trunk; several with commas are tried in turn.",
        callback=checked_addresses,
    ),
]
SeedOption = Annotated[
    int,
    typer.Option(help="Fixes adapters, data order and dropout.", min=0, max=SEEDS - 1),
]
AdapterOption = Annotated[
    Path | None,
    typer.Option(
        help="Folder of a PEFT adapter of the whole model to start from.",
        parser=given_path,
        metavar="PATH",
    ),
]
ThreadsOption = Annotated[
    int,
    typer.Option(help="Torch threads of this process; 0: all cores.", min=0, max=_MOST_THREADS),
]
SeqLenOption = Annotated[int, typer.Option(help="Tokens of one block.", min=2, max=MOST)]
BatchSizeOption = Annotated[int, typer.Option(help="Blocks of one batch.", min=1, max=MOST)]
StepsOption = Annotated[int, typer.Option(help="Optimizer steps.", min=1, max=MOST)]
NewTokensOption = Annotated[
    int, typer.Option(help="Of one reply or continuation, at most.", min=1, max=MOST)
]
TemperatureOption = Annotated[
    float, typer.Option(help="0 takes the likeliest token.", callback=_check_temperature)
]
TopKOption = Annotated[
    int, typer.Option(help="Sample from the k likeliest; 0: all.", min=0, max=MOST)
]

PeftOption = Annotated[
    str,
    typer.Option(
        help="lora, dora, rslora, adalora, ia3, prefix, prompt or p-tuning.", callback=_check_peft
    ),
]
PeftConfigOption = Annotated[
    Path | None,
    typer.Option(
        help="JSON of a PEFT configuration, instead of --peft.", parser=given_path, metavar="PATH"
    ),
]
PeftPartsOption = Annotated[
    Literal["all", "bottom", "trunk", "top", "ends"], typer.Option(help="What --peft adapts.")
]
QuantizeOption = Annotated[
    str,
    typer.Option(
        help="Hold the ends' base weights in nf4 or int8; the trunk decides its own.",
        callback=_check_quantize,
    ),
]
WireFormatOption = Annotated[
    str,
    typer.Option(
        help="How hidden states and gradients travel: float32, bfloat16, float16, int8.",
        callback=_check_wire_format,
    ),
]
GradientWireFormatOption = Annotated[
    str | None,
    typer.Option(help="Of gradients, if another than --wire-format.", callback=_check_wire_format),
]
AdapterWireFormatOption = Annotated[
    str,
    typer.Option(
        help="How the adapter's values and their gradients travel; the trunk rounds, too.",
        callback=_check_wire_format,
    ),
]
WireDriftOption = Annotated[
    float | None,
    typer.Option(
        help="Goes back to float32 when a loss is further than this from its own.",
        callback=_check_wire_drift,
    ),
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
    except Exception as error:  # transformers and tokenizers raise whatever they meet
        raise CheckpointError(f"{model}: no tokenizer there ({first_line(error)})") from error


def load_blocks(
    model: str, data: Path, seq_len: int, adapter: PeftConfig | None = None
) -> tuple[Any, torch.Tensor]:
    """Reads and tokenizes a text that a model shall be run on.

    Args:
        model: Folder or hub id.
        data: Of the text.
        seq_len: Tokens of a block.
        adapter: Of the model, whose virtual tokens take positions too.

    Returns:
        The tokenizer, and token ids [N, T].

    Raises:
        CheckpointError: If there is no such model, or it has no tokenizer.
        DataError: If the text is unreadable, too short or has tokens that the model lacks.
        InvalidInputError: If the model has no positions for such blocks.
    """
    config = open_checkpoint(model).config
    check_block_length(config, seq_len, virtual_tokens(adapter))
    texts, tokenizer = read_texts(data), load_tokenizer(model)
    blocks_NT = token_blocks(texts, tokenizer, seq_len)
    check_vocabulary(blocks_NT, tokenizer, config)
    return tokenizer, blocks_NT


def adapter_config(folder: Path | None) -> PeftConfig | None:
    """The configuration of ``--adapter``; None without one.

    Raises:
        AdapterError: If there is none, or it is damaged.
    """
    return None if folder is None else read_adapter(folder)[0]


def read_peft_config(
    method: str, file: Path | None, model: str, dropout: float, steps: int
) -> PeftConfig:
    """The configuration of ``--peft-config``, or a default one of the method ``--peft``.

    Raises:
        AdapterError: If the file is unreadable or the method unknown.
    """
    if file is None:
        return default_config(method, open_checkpoint(model).family, dropout, steps)
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise AdapterError(f"{file}: not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise AdapterError(f"{file}: {error.strerror}; accepted is a JSON file") from error
    try:
        return config_from_json(text)
    except AdapterError as error:
        raise AdapterError(f"{file}: {error}") from error


def check_text(option: str, text: str) -> None:
    """Refuses what was not UTF-8 on the command line.

    Raises:
        DataError: Names the option.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{option}: not UTF-8 text (character {error.start})") from error


def show(facts: dict[str, Any]) -> None:
    """Prints JSON to standard output."""
    typer.echo(json.dumps(facts, indent=2))
