"""Who may reach the trunk: what the settings of TLS and tokens come to on an address."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import grpc

from shared.errors import InvalidInputError
from shared.loopback import is_loopback
from shared.secret_files import TlsFiles, read_tls_folder
from trunk_service.identity import Authenticator
from trunk_service.tokens import TokenFile

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Access:
    """How a server lets clients in."""

    authenticator: Authenticator
    credentials: grpc.ServerCredentials | None
    """None serves without TLS."""
    off: tuple[str, ...]
    """The defences that are off, for the log."""


def open_access(
    listen: str, tls: Path | None, tokens: Path | None, insecure: bool = False
) -> Access:
    """Decides how clients are let in; never less than mutual TLS for other hosts.

    Args:
        listen: The HOST:PORT that is served.
        tls: Folder of ``ca.pem``, ``cert.pem`` and ``key.pem``.
        tokens: Tokens file.
        insecure: Turns TLS, client certificates and tokens off; on loopback only.

    Raises:
        InvalidInputError: If the combination would let in whom nobody identified, or a file is
            unusable.
    """
    local = is_loopback(listen)
    accepted = "accepted: --tls DIR (see `trunkline certs`), or --listen 127.0.0.1:PORT"
    if insecure and not local:
        raise InvalidInputError(
            f"--insecure works on a loopback address only, not on {listen}; {accepted}"
        )
    if insecure:
        _say_what_is_turned_off(tls, tokens)
        tls = tokens = None
    if tls is None and not local:
        raise InvalidInputError(
            f"{listen} can be reached from other hosts, which needs TLS with client certificates; "
            f"{accepted}"
        )
    if tls is None and tokens is not None:
        raise InvalidInputError(
            "--tokens without --tls would take tokens that anybody on the way can read; "
            "accepted: --tokens FILE together with --tls DIR"
        )
    if tls is None:
        return Access(Authenticator(), None, ("TLS", "client certificates", "tokens"))
    credentials = _server_credentials(tls)
    if tokens is None:
        return Access(Authenticator(tls=True), credentials, ("tokens",))
    return Access(Authenticator(tls=True, tokens=TokenFile(tokens)), credentials, ())


def _say_what_is_turned_off(tls: Path | None, tokens: Path | None) -> None:
    logger.warning(
        "--insecure turns off: TLS (%s), client certificates, tokens (%s)",
        "was not set" if tls is None else f"set to {tls}",
        "were not set" if tokens is None else f"set to {tokens}",
    )


def _server_credentials(folder: Path) -> grpc.ServerCredentials:
    """Credentials that follow the folder's files, so that renewing them needs no restart."""
    files = read_tls_folder(folder)

    def renewed() -> grpc.ServerCertificateConfiguration | None:
        nonlocal files
        try:
            now = read_tls_folder(folder)
        except InvalidInputError as error:
            logger.error("the TLS files that were read before stay in use: %s", error)
            return None
        if now == files:
            return None
        files = now
        logger.info("TLS files read again")
        return _configuration(now)

    return grpc.dynamic_ssl_server_credentials(
        _configuration(files),
        renewed,  # type: ignore[arg-type]  # the stub lacks None, which keeps what is in use
        require_client_authentication=True,
    )


def _configuration(files: TlsFiles) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration(
        [(files.key_pem, files.cert_pem)], root_certificates=files.ca_pem
    )
