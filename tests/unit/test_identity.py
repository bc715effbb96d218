"""Who is who: the tokens file, and what a certificate or token comes to."""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from client_service.certificates import write_certificates
from shared.errors import AuthenticationError, InvalidInputError
from shared.loopback import is_loopback
from trunk_service.access import open_access
from trunk_service.identity import Authenticator
from trunk_service.tokens import TokenFile, parse_tokens

TOKEN, OTHER = "0123456789abcdef", "fedcba9876543210"


class Call:
    """What gRPC knows of a call."""

    def __init__(self, certificate: Path | None, *authorization: str) -> None:
        self._pem = certificate.read_bytes() if certificate else None
        self._metadata = tuple(("authorization", value) for value in authorization)

    def auth_context(self) -> dict[str, list[bytes]]:
        return {"x509_pem_cert": [self._pem]} if self._pem else {}

    def invocation_metadata(self) -> Any:
        return self._metadata


def write(file: Path, text: str) -> Path:
    """Puts another file in its place: one that is written twice in a clock tick looks the same."""
    new = file.with_suffix(".new")
    new.write_text(text, encoding="utf-8")
    new.chmod(0o600)
    return new.replace(file)


def test_lines_give_a_tenant_a_token_and_an_expiry() -> None:
    text = (
        f"# comment\n\n  alice {TOKEN}\nbob\t{OTHER}  2030-01-31\nbob {OTHER}x 2030-01-31T12+01:00"
    )
    lines, problems = parse_tokens(text)
    assert problems == []
    assert [(line.tenant, line.expires) for line in lines] == [
        ("alice", None),
        ("bob", datetime(2030, 1, 31, tzinfo=UTC)),
        ("bob", datetime(2030, 1, 31, 11, tzinfo=UTC)),
    ]
    assert TOKEN not in repr(lines)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (TOKEN, "TENANT TOKEN"),
        (f"alice {TOKEN} 2030-01-31 12:00", "TENANT TOKEN"),
        (f"alice {TOKEN[:15]}", "16 to 512"),
        (f"alice {TOKEN}ü", "16 to 512"),
        (f"ali/ce {TOKEN}", "tenant's name"),
        (f"{'a' * 65} {TOKEN}", "tenant's name"),
        (f"alice {OTHER} {TOKEN}", "ISO date"),
        (f"bob {OTHER}\nalice {OTHER}", "earlier line"),
    ],
)
def test_a_malformed_line_is_named_by_its_number_alone(
    line: str, said: str, tmp_path: Path
) -> None:
    file = write(tmp_path / "tokens", f"# first\n{line}\n")
    with pytest.raises(InvalidInputError, match=rf"line [23]: .*{said}") as caught:
        TokenFile(file)
    assert not [word for word in (TOKEN[:15], OTHER) if word in str(caught.value)]


def test_the_file_is_followed_while_the_daemon_runs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write(tmp_path / "tokens", f"alice {TOKEN}\nbob {OTHER}\n")
    tokens = TokenFile(file)
    assert (tokens.tenant_of(TOKEN), tokens.tenant_of(OTHER)) == ("alice", "bob")
    write(file, f"alice {TOKEN} 2020-01-31\nbob short\n")
    with pytest.raises(AuthenticationError, match="expired"):
        tokens.tenant_of(TOKEN)
    with pytest.raises(AuthenticationError, match="not accepted"):
        tokens.tenant_of(OTHER)
    assert "line 2" in caplog.text and "short" not in caplog.text
    write(file, f"alice {TOKEN}\n")
    assert tokens.tenant_of(TOKEN) == "alice"
    file.unlink()
    with pytest.raises(AuthenticationError, match="not accepted"):
        tokens.tenant_of(TOKEN)


def test_a_file_that_others_can_read_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write(tmp_path / "tokens", f"alice {TOKEN}\n")
    TokenFile(file)
    assert caplog.records == []
    file.chmod(0o640)
    TokenFile(file)
    assert "chmod 600" in caplog.text and caplog.records[0].levelno == logging.WARNING


def test_a_peer_is_who_its_certificate_or_token_says(tmp_path: Path) -> None:
    write_certificates(tmp_path / "pki", tenants=["alice", "bob"])
    write_certificates(tmp_path / "pki", tenants=["late"], days=0)
    alice, late = (tmp_path / "pki/clients" / name / "cert.pem" for name in ("alice", "late"))
    local: Any = Authenticator().identify(Call(None))
    assert local.tenant == "local"
    local.check()
    by_certificate = Authenticator(tls=True)
    peer = by_certificate.identify(Call(alice))
    assert peer.tenant == "alice"
    peer.check()
    with pytest.raises(AuthenticationError, match="no client certificate"):
        by_certificate.identify(Call(None))
    with pytest.raises(AuthenticationError, match="has expired"):
        by_certificate.identify(Call(late))
    with pytest.raises(AuthenticationError, match="common name"):
        by_certificate.identify(Call(tmp_path / "pki/ca/ca.pem"))

    file = write(tmp_path / "tokens", f"acme {TOKEN}\n")
    by_token = Authenticator(tls=True, tokens=TokenFile(file))
    peer = by_token.identify(Call(alice, f"Bearer {TOKEN}"))
    assert peer.tenant == "acme"
    peer.check()
    for wrong in ((), (TOKEN,), (f"Bearer {TOKEN}", f"Bearer {TOKEN}")):
        with pytest.raises(AuthenticationError, match="no token"):
            by_token.identify(Call(alice, *wrong))
    with pytest.raises(AuthenticationError, match="no client certificate"):
        by_token.identify(Call(None, f"Bearer {TOKEN}"))
    write(file, f"other {TOKEN}\n")
    with pytest.raises(AuthenticationError, match="another tenant's"):
        peer.check()
    write(file, "# none\n")
    with pytest.raises(AuthenticationError, match="not accepted"):
        peer.check()


def test_tls_files_that_cannot_serve_are_named(tmp_path: Path) -> None:
    pki = tmp_path / "pki"
    write_certificates(pki, tenants=["alice"])
    server = pki / "server"
    assert open_access("0.0.0.0:0", server, None).off == ("tokens",)
    with pytest.raises(InvalidInputError, match="--tokens without --tls"):
        open_access("127.0.0.1:0", None, tmp_path / "tokens")
    with pytest.raises(InvalidInputError, match=r"nowhere/ca\.pem: No such file"):
        open_access("127.0.0.1:0", tmp_path / "nowhere", None)
    (server / "key.pem").write_bytes((pki / "clients/alice/key.pem").read_bytes())
    with pytest.raises(InvalidInputError, match=r"not the key of cert\.pem"):
        open_access("127.0.0.1:0", server, None)
    (server / "key.pem").write_text("-----BEGIN PRIVATE KEY-----\nno\n-----END PRIVATE KEY-----\n")
    with pytest.raises(InvalidInputError, match="no unencrypted private key"):
        open_access("127.0.0.1:0", server, None)
    (server / "cert.pem").write_text("nothing")
    with pytest.raises(InvalidInputError, match="no PEM certificate"):
        open_access("127.0.0.1:0", server, None)


@pytest.mark.parametrize(
    ("address", "stays"),
    [
        ("127.0.0.1:1", True),
        ("127.1.2.3:1", True),
        ("[::1]:1", True),
        ("localhost:1", True),
        ("0.0.0.0:1", False),
        ("[::]:1", False),
        ("192.0.2.1:1", False),
        ("trunk:1", False),
        ("localhost.example.org:1", False),
        ("dns:///localhost:1", False),
        ("127.0.0.1.example.org:1", False),
    ],
)
def test_what_stays_on_this_machine(address: str, stays: bool) -> None:
    assert is_loopback(address) == stays
