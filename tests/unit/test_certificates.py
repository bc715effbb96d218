"""The certificates that ``trunkline certs`` makes."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.verification import PolicyBuilder, Store

from client_service.certificates import write_certificates
from shared.errors import InvalidInputError
from shared.secret_files import read_tls_folder


def certificate(file: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(file.read_bytes())


def test_a_strict_verifier_takes_the_servers_certificate(tmp_path: Path) -> None:
    out = tmp_path / "pki"
    written = write_certificates(out, hosts=["trunk", "192.0.2.7"])
    assert written == [out / "ca", out / "server", out / "client"]
    policy = PolicyBuilder().store(Store([certificate(out / "ca/ca.pem")]))
    for name in (x509.DNSName("localhost"), x509.DNSName("trunk")):
        policy.build_server_verifier(name).verify(certificate(out / "server/cert.pem"), [])
    with pytest.raises(x509.verification.VerificationError):
        policy.build_server_verifier(x509.DNSName("elsewhere")).verify(
            certificate(out / "server/cert.pem"), []
        )
    with pytest.raises(x509.verification.VerificationError):
        policy.build_client_verifier().verify(certificate(out / "server/cert.pem"), [])


def test_keys_are_their_owners_alone_and_the_cas_stays_where_it_is(tmp_path: Path) -> None:
    out = tmp_path / "pki"
    write_certificates(out, tenants=["alice"])
    keys = sorted(path.relative_to(out) for path in out.rglob("*key.pem"))
    assert list(map(str, keys)) == ["ca/ca-key.pem", "clients/alice/key.pem", "server/key.pem"]
    assert {stat.S_IMODE((out / key).stat().st_mode) for key in keys} == {0o600}
    for folder in ("server", "clients/alice"):
        read_tls_folder(out / folder)
        assert sorted(p.name for p in (out / folder).iterdir()) == ["ca.pem", "cert.pem", "key.pem"]


def test_tenants_are_added_to_a_ca_and_nothing_is_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "pki"
    write_certificates(out, tenants=["alice"])
    before = {path: path.read_bytes() for path in out.rglob("*.pem")}
    assert write_certificates(out, tenants=["bob"]) == [out / "clients/bob"]
    for refused, said in (
        ({"tenants": ["alice"]}, "alice exists"),
        ({"tenants": ["carol", "bob"]}, "bob exists"),
        ({"hosts": ["trunk"], "tenants": ["carol"]}, "server exists"),
        ({}, "--tenant NAME"),
        ({"tenants": ["../up"]}, "letters, digits"),
        ({"hosts": ["trunk:50052"]}, "no port"),
    ):
        with pytest.raises(InvalidInputError, match=said):
            write_certificates(out, **refused)
    assert not (out / "clients/carol").exists()
    assert all(path.read_bytes() == content for path, content in before.items())
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(InvalidInputError, match="no CA of ours"):
        write_certificates(tmp_path / "full")
