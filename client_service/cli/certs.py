"""``trunkline certs``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from client_service.certificates import write_certificates
from client_service.cli import app
from client_service.cli.options import given_path, show


@app.command("certs")
def certs_command(
    out: Annotated[
        Path,
        typer.Option(
            help="New folder; or one made before, to add a --tenant to.",
            parser=given_path,
            metavar="PATH",
        ),
    ],
    host: Annotated[
        list[str] | None,
        typer.Option(help="Name or IP address of the trunk beside localhost; may be repeated."),
    ] = None,
    tenant: Annotated[
        list[str] | None,
        typer.Option(help="Tenant to make OUT/clients/NAME for; may be repeated."),
    ] = None,
    days: Annotated[
        int, typer.Option(help="How long the certificates are valid.", min=1, max=3650)
    ] = 90,
) -> None:
    """Make a CA with certificates for a trunk and its tenants, keys readable by you alone.

    OUT/server is for `trunkd --tls`, OUT/client or OUT/clients/NAME for `trunkline --tls`. Keep
    OUT/ca elsewhere: whoever has its key can make tenants.
    """
    written = write_certificates(out, host or (), tenant or (), days)
    show({"written": [str(folder) for folder in written]})
