"""Keys, certificates and tokens, read from files with errors that name the file, never its text."""

from __future__ import annotations

import logging
import stat
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
)

from shared.errors import InvalidInputError

logger = logging.getLogger(__name__)

_OTHERS_READ = stat.S_IRGRP | stat.S_IROTH


@dataclass(frozen=True)
class TlsFiles:
    """What one end of a mutual TLS connection needs."""

    ca_pem: bytes
    """Certificates of the authority that the other end's certificate must be of."""
    cert_pem: bytes
    key_pem: bytes = field(repr=False)


def read_secret(path: Path) -> bytes:
    """Reads a file that only its owner should be able to read; warns if others can.

    Raises:
        InvalidInputError: If it cannot be read.
    """
    content = _read(path)
    if path.stat().st_mode & _OTHERS_READ:
        logger.warning("%s can be read by other users of this machine: chmod 600 it", path)
    return content


def read_tls_folder(folder: Path) -> TlsFiles:
    """Reads ``ca.pem``, ``cert.pem`` and ``key.pem`` and checks that they can serve.

    Raises:
        InvalidInputError: If one is missing or unreadable, the key is not the certificate's, or
            the certificate has expired.
    """
    files = TlsFiles(
        ca_pem=_read(folder / "ca.pem"),
        cert_pem=_read(folder / "cert.pem"),
        key_pem=read_secret(folder / "key.pem"),
    )
    _certificate(folder / "ca.pem", files.ca_pem)
    certificate = _certificate(folder / "cert.pem", files.cert_pem)
    try:
        key = load_pem_private_key(files.key_pem, password=None)
    except (ValueError, TypeError) as error:
        raise InvalidInputError(f"{folder / 'key.pem'}: no unencrypted private key") from error
    form = Encoding.DER, PublicFormat.SubjectPublicKeyInfo
    if key.public_key().public_bytes(*form) != certificate.public_key().public_bytes(*form):
        raise InvalidInputError(f"{folder}: key.pem is not the key of cert.pem")
    if (end := certificate.not_valid_after_utc) <= datetime.now(UTC):
        raise InvalidInputError(f"{folder / 'cert.pem'} has expired at {end.isoformat()}")
    return files


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidInputError(f"{path}: {error.strerror or 'cannot be read'}") from error


def _certificate(path: Path, pem: bytes) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError as error:
        raise InvalidInputError(f"{path}: no PEM certificate") from error
