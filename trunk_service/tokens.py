"""The tokens file: which tenant a bearer token stands for, and until when.

A line is ``TENANT TOKEN [EXPIRY]``; empty lines and those that begin with ``#`` are skipped. Only
digests of tokens are kept in memory, and none is ever part of a message.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from shared.errors import AuthenticationError, InvalidInputError
from shared.secret_files import read_secret

logger = logging.getLogger(__name__)

MIN_TOKEN_LENGTH = 16
TENANT_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")

# What an HTTP header may carry as a bearer token (RFC 6750).
_TOKEN = re.compile(rf"[A-Za-z0-9._~+/=-]{{{MIN_TOKEN_LENGTH},512}}")


@dataclass(frozen=True)
class TokenLine:
    """One accepted token."""

    tenant: str
    digest: bytes = field(repr=False)
    expires: datetime | None = None


class TokenFile:
    """A tokens file, read again whenever it changes.

    Args:
        path: The file.

    Raises:
        InvalidInputError: If it cannot be read, or a line is malformed; names the line's number.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines, problems = parse_tokens(read_secret(path).decode("utf-8", "replace"))
        if problems:
            raise InvalidInputError(f"{path}, {problems[0]}")
        self._version = self._now()

    def tenant_of(self, token: str) -> str:
        """The tenant whose token this is.

        Raises:
            AuthenticationError: If it is unknown, was removed, or has expired.
        """
        self._refresh()
        digest, found = _digest(token), None
        # All lines are compared, so the time taken does not tell which one is alike.
        for line in self._lines:
            if hmac.compare_digest(line.digest, digest):
                found = line
        if found is None:
            raise AuthenticationError("the token is not accepted")
        if found.expires is not None and found.expires <= datetime.now(UTC):
            raise AuthenticationError("the token has expired")
        return found.tenant

    def _refresh(self) -> None:
        version = self._now()
        if version == self._version:
            return
        self._version = version
        try:
            text = read_secret(self._path).decode("utf-8", "replace")
        except InvalidInputError as error:
            logger.error("no token is accepted any more: %s", error)
            self._lines = []
            return
        # A daemon with tenants does not stop over a typing error, and what was removed must go.
        self._lines, problems = parse_tokens(text)
        for problem in problems:
            logger.error("%s, %s; the line is ignored", self._path, problem)
        logger.info("tokens read again", extra={"tokens": len(self._lines)})

    def _now(self) -> tuple[int, int, int]:
        try:
            found = self._path.stat()
        except OSError:
            return (0, 0, 0)
        return (found.st_mtime_ns, found.st_size, found.st_ino)


def parse_tokens(text: str) -> tuple[list[TokenLine], list[str]]:
    """Reads the lines of a tokens file.

    Returns:
        The good lines, and what is wrong with the others, by their numbers and without their text.
    """
    lines: list[TokenLine] = []
    problems: list[str] = []
    for number, content in enumerate(text.splitlines(), start=1):
        words = content.split()
        if not words or words[0].startswith("#"):
            continue
        try:
            line = _parse(words)
            if any(line.digest == other.digest for other in lines):
                raise ValueError("the token is already on an earlier line")
            lines.append(line)
        except ValueError as error:
            problems.append(f"line {number}: {error}")
    return lines, problems


def _parse(words: list[str]) -> TokenLine:
    if len(words) not in (2, 3):
        raise ValueError("a line is TENANT TOKEN [EXPIRY]")
    tenant, token, *rest = words
    # A tenant is not shown either: the words may be in the wrong order.
    if not TENANT_NAME.fullmatch(tenant):
        raise ValueError("a tenant's name is 1 to 64 letters, digits or any of _ - .")
    if not _TOKEN.fullmatch(token):
        raise ValueError(
            f"a token is {MIN_TOKEN_LENGTH} to 512 letters, digits or any of - . _ ~ + / ="
        )
    return TokenLine(tenant, _digest(token), _moment(rest[0]) if rest else None)


def _moment(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        # Without its cause, which would quote the text.
        raise ValueError(
            "an expiry is an ISO date or datetime, such as 2030-01-31 or 2030-01-31T12:00+01:00"
        ) from None
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
