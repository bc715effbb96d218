"""``trunkline export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from client_service.cli import app
from client_service.cli.options import ThreadsOption, given_path, prepare, show
from client_service.export import export


@app.command("export")
def export_command(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="Adapter folder; Trainer checkpoint-N or output folder (its newest checkpoint); "
            "`trunkline train --out` folder; or what PEFTSplitLearningTrainer saved.",
            parser=given_path,
            metavar="CHECKPOINT",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(help="New folder for the adapter.", parser=given_path, metavar="PATH"),
    ],
    merge: Annotated[
        bool,
        typer.Option(
            "--merge",
            help="Also write the base model with the adapter merged in, with its tokenizer, to "
            "OUT/merged (float32).",
        ),
    ] = False,
    model: Annotated[
        str,
        typer.Option(help="Base model, folder or hub id; default: what the adapter says."),
    ] = "",
    threads: ThreadsOption = 0,
) -> None:
    """Write ONE standard PEFT adapter of the whole model, and the merged model if asked.

    Reads everything again and compares before OUT appears; prints the differences.
    """
    prepare(threads)
    show(export(checkpoint, out, merge, model).as_dict())
