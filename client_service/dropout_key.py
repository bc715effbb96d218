"""Keys of the trunk's dropout masks: they repeat for the client, and tell the host nothing.

The number of a mask is drawn from torch's generator, so that a seed, or a generator that a Trainer
restores, gives the same masks again. Torch keeps 32 bits of a seed: sent as it is, such a number
would let a host find the seed, and with it the client's own fresh adapter. So what is sent is its
HMAC under a secret of the user's.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from pathlib import Path

import torch

from shared.errors import InvalidInputError

SECRET_BYTES = 32
SECRET_VARIABLE = "TRUNKLINE_DROPOUT_SECRET"
"""Of the environment: a file to take in the place of the user's own."""


def dropout_key(secret: bytes) -> bytes:
    """Draws the next number from torch's generator; returns its key."""
    number = int(torch.randint(2**62, ()))
    return hmac.digest(secret, number.to_bytes(8, "little"), "sha256")


def user_secret(path: Path | None = None) -> bytes:
    """Reads the user's secret, which is made at the first use.

    Args:
        path: Another file than the user's own.

    Raises:
        InvalidInputError: If it cannot be read or made, or is no secret.
    """
    path = path or _usual_path()
    try:
        if not path.exists():
            _make(path)
        secret = path.read_bytes()
    except OSError as error:
        raise InvalidInputError(
            f"{path}: the secret of dropout keys cannot be read or made ({error.strerror}); name "
            f"another file in {SECRET_VARIABLE}"
        ) from error
    if len(secret) != SECRET_BYTES:
        raise InvalidInputError(
            f"{path}: {len(secret)} bytes are no secret of dropout keys; accepted: {SECRET_BYTES}"
        )
    return secret


def fingerprint(secret: bytes) -> str:
    """Names a secret without telling it."""
    return hashlib.sha256(b"trunkline dropout" + secret).hexdigest()[:16]


def _usual_path() -> Path:
    if named := os.environ.get(SECRET_VARIABLE):
        return Path(named)
    home = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(home) / "trunkline" / "dropout_secret"


def _make(path: Path) -> None:
    """Writes a fresh one, whole; of several that make it at once, one remains."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    fresh = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(SECRET_BYTES))
        try:
            os.link(fresh, path)
        except FileExistsError:
            return  # another process was first
    finally:
        fresh.unlink()
