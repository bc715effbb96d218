"""``trunkline``: fine-tune, run and check a split model from the command line."""

from __future__ import annotations

import sys

import typer

from shared.errors import TrunklineError

app = typer.Typer(
    name="trunkline",
    help="Fine-tune and run a language model that lives in two places.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Runs the command line; exits 2 on an error that names what to change."""
    # The commands are registered by being imported, and importing them loads torch.
    from client_service.cli import chat, demo, export, gguf, model, train  # noqa: F401

    try:
        app()
    except TrunklineError as error:
        sys.stderr.write(f"trunkline: {type(error).__name__}: {error}\n")
        sys.exit(2)
