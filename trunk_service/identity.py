"""Who a client is: its certificate's common name, or the tenant of its token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

import grpc
from cryptography import x509
from cryptography.x509.oid import NameOID

from shared.errors import AuthenticationError
from trunk_service.tokens import TENANT_NAME, TokenFile

LOCAL_TENANT = "local"

_BEARER = "Bearer "

Context = grpc.aio.ServicerContext[object, object]


@dataclass(frozen=True)
class Peer:
    """A client that was identified."""

    tenant: str
    check: Callable[[], None]
    """Raises AuthenticationError once its certificate or token is not accepted any more."""


class Authenticator:
    """Identifies clients.

    Args:
        tls: Whether connections are TLS with client certificates; without, everyone is the one
            tenant ``local``.
        tokens: Tokens that are asked for beside the certificate; None asks for none.
    """

    def __init__(self, tls: bool = False, tokens: TokenFile | None = None) -> None:
        self._tls, self._tokens = tls, tokens

    def identify(self, context: Context) -> Peer:
        """Tells who calls.

        Raises:
            AuthenticationError: If the certificate or the token is missing or not accepted.
        """
        if not self._tls:
            return Peer(LOCAL_TENANT, _nothing_to_check)
        certificate = _certificate(context)
        _check_not_expired(certificate)
        if self._tokens is None:
            return Peer(_name_of(certificate), lambda: _check_not_expired(certificate))
        tokens, token = self._tokens, _token(context)
        tenant = tokens.tenant_of(token)

        def check() -> None:
            _check_not_expired(certificate)
            if tokens.tenant_of(token) != tenant:
                raise AuthenticationError("the token is another tenant's by now")

        return Peer(tenant, check)


def _nothing_to_check() -> None:
    pass


def _certificate(context: Context) -> x509.Certificate:
    # gRPC has checked the chain; a connection without one does not get here, unless by a fault.
    pems = list(context.auth_context().get("x509_pem_cert", ()))
    if len(pems) != 1:
        raise AuthenticationError("no client certificate")
    pem: bytes = pems[0]
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError as error:
        raise AuthenticationError("the client certificate cannot be read") from error


def _check_not_expired(certificate: x509.Certificate) -> None:
    # TLS looks at the dates when a connection begins, and connections last for days.
    if certificate.not_valid_after_utc <= datetime.now(UTC):
        raise AuthenticationError("the client certificate has expired")


def _name_of(certificate: x509.Certificate) -> str:
    names = [str(n.value) for n in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    if len(names) != 1 or not TENANT_NAME.fullmatch(names[0]):
        raise AuthenticationError(
            "the client certificate must have one common name of 1 to 64 letters, digits or any "
            "of _ - ."
        )
    return names[0]


def _token(context: Context) -> str:
    found = [value for key, value in context.invocation_metadata() or () if key == "authorization"]
    if len(found) != 1 or not isinstance(found[0], str) or not found[0].startswith(_BEARER):
        raise AuthenticationError("no token: this trunk asks for one beside the certificate")
    return found[0].removeprefix(_BEARER)
