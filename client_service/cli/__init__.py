"""``trunkline``: fine-tune, run and check a split model from the command line."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from client_service.cli.mistakes import in_one_line
from client_service.credentials import TLS_VARIABLE, TOKEN_VARIABLE
from shared.errors import TrunklineError

app = typer.Typer(
    name="trunkline",
    help="Fine-tune and run a language model that lives in two places.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def identify(
    tls: Annotated[
        Path | None,
        typer.Option(
            envvar=TLS_VARIABLE,
            help="Folder of ca.pem, cert.pem and key.pem to reach a trunk with.",
        ),
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(envvar=TOKEN_VARIABLE, help="File with the token that the trunk asks for."),
    ] = None,
) -> None:
    """Fine-tune and run a language model that lives in two places."""
    # What opens a connection looks there, at whatever depth of the library.
    if tls is not None:
        os.environ[TLS_VARIABLE] = str(tls)
    if token_file is not None:
        os.environ[TOKEN_VARIABLE] = str(token_file)


def main() -> None:
    """Runs the command line; exits 2 on an error, told in one line that names what to change."""
    # The commands are registered by being imported, and importing them loads torch.
    from client_service.cli import bench, certs, chat, demo, export, gguf, model, train  # noqa: F401

    try:
        code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except typer.TyperException as error:
        _refuse(f"UsageError: {in_one_line(error)}")
    except (TrunklineError, OSError) as error:
        _refuse(f"{type(error).__name__}: {in_one_line(error)}")
    except typer.Abort:
        _refuse("aborted")
    sys.exit(code)


def _refuse(said: str) -> NoReturn:
    sys.stderr.write(f"trunkline: {said}\n")
    sys.exit(2)
