"""What a client shows a trunk: a certificate and, where the trunk asks for one, a token."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import grpc

from shared.errors import InvalidInputError
from shared.secret_files import read_secret, read_tls_folder

TLS_VARIABLE = "TRUNKLINE_TLS"
TOKEN_VARIABLE = "TRUNKLINE_TOKEN_FILE"


@dataclass(frozen=True)
class Credentials:
    """Files to identify with, read anew for every connection, so that renewing them is enough."""

    tls: Path
    """Folder of ``ca.pem``, ``cert.pem`` and ``key.pem``, as ``trunkline certs`` writes it."""
    token_file: Path | None = None
    """Holds the token alone."""

    @classmethod
    def from_environment(cls) -> Credentials | None:
        """What ``TRUNKLINE_TLS`` and ``TRUNKLINE_TOKEN_FILE`` name; None if nothing.

        Raises:
            InvalidInputError: If there is a token but no TLS to send it in.
        """
        tls, token_file = os.environ.get(TLS_VARIABLE), os.environ.get(TOKEN_VARIABLE)
        if not tls:
            if token_file:
                raise InvalidInputError(
                    f"a token ({TOKEN_VARIABLE} or --token-file) is sent inside TLS only; give "
                    f"the folder of the certificate too ({TLS_VARIABLE} or --tls)"
                )
            return None
        return cls(Path(tls), Path(token_file) if token_file else None)

    def for_channel(self) -> grpc.ChannelCredentials:
        """Reads the files into gRPC's credentials.

        Raises:
            InvalidInputError: If one is missing or unusable; names it.
        """
        files = read_tls_folder(self.tls)
        channel = grpc.ssl_channel_credentials(files.ca_pem, files.key_pem, files.cert_pem)
        if self.token_file is None:
            return channel
        call = grpc.access_token_call_credentials(_read_token(self.token_file))
        return grpc.composite_channel_credentials(channel, call)


def tls_hint(details: str | None) -> str:
    """What to look at when a connection failed with these details of gRPC's; empty if unclear."""
    said = (details or "").lower()
    if any(word in said for word in ("handshake", "certificate", "ssl", "tls")):
        return (
            "; TLS was not agreed on: either side's certificate may be expired, of another CA or "
            f"for another host name, or the trunk serves without TLS (see {TLS_VARIABLE} and --tls)"
        )
    if any(word in said for word in ("socket closed", "reset", "broken pipe")):
        return (
            "; the trunk may ask for TLS, or not accept this client's certificate (see "
            f"{TLS_VARIABLE} and --tls)"
        )
    return ""


def _read_token(file: Path) -> str:
    try:
        token = read_secret(file).decode("ascii").strip()
    except UnicodeDecodeError:
        token = ""  # and the cause, which would show a part of it, is left out
    if not token or token.split() != [token]:
        raise InvalidInputError(f"{file}: not one token of ASCII characters without spaces")
    return token
