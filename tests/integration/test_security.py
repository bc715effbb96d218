"""Nobody in: whom a daemon refuses before a session, and what a client refuses to connect to."""

from __future__ import annotations

import json
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from client_service.certificates import write_certificates
from client_service.connection import SERVICE, get_info, open_channel
from client_service.credentials import Credentials
from shared.errors import AuthenticationError, InvalidInputError, TrunkUnavailableError
from shared.pb.trunkline.v1 import trunk_pb2 as pb
from shared.secret_files import read_tls_folder
from tests.conftest import Daemon, start_daemon
from tests.patience import PATIENCE_S

ALICE, BOB, EXPIRED, UNKNOWN = (f"{name}-0123456789abcdef" for name in ("al", "bo", "ex", "un"))
# Certificates decide who may speak at all, so no error may come from anything else.
REFUSED_BY_TLS = "TLS was not agreed on|not accept this client's certificate"


@dataclass
class Site:
    """A daemon with TLS and tokens, and what its operator has."""

    daemon: Daemon
    pki: Path
    tokens: Path

    def ask(self, tls: Path | None, token: str | None = None) -> pb.GetInfoResponse:
        """GetInfo as a client with these files, none of which it checks before it sends them."""
        if tls is None:
            credentials = None
        else:
            files = read_files(tls)
            credentials = grpc.ssl_channel_credentials(files[0], files[1], files[2])
            if token is not None:
                call = grpc.access_token_call_credentials(token)
                credentials = grpc.composite_channel_credentials(credentials, call)
        address = self.daemon.address
        with (
            grpc.insecure_channel(address)
            if credentials is None
            else grpc.secure_channel(address, credentials)
        ) as channel:
            return get_info(channel, address, timeout_s=PATIENCE_S)


def read_files(folder: Path) -> tuple[bytes, bytes | None, bytes | None]:
    key, cert = folder / "key.pem", folder / "cert.pem"
    ca = (folder / "ca.pem").read_bytes()
    return (ca, key.read_bytes(), cert.read_bytes()) if key.exists() else (ca, None, None)


def write_tokens(file: Path, *lines: str) -> None:
    replace(file, "# who has which\n\n" + "\n".join(lines) + "\n")


def replace(file: Path, text: str) -> None:
    """With another file: one that is written twice in a clock tick looks the same."""
    new = file.with_suffix(".new")
    new.write_text(text, encoding="utf-8")
    new.chmod(0o600)
    new.replace(file)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    pki, tokens = folder / "pki", folder / "tokens"
    write_certificates(pki, tenants=["alice", "bob"])
    write_certificates(pki, tenants=["late"], days=0)
    write_certificates(folder / "other", tenants=["alice"])
    # Trusts our CA, so that the trunk alone can refuse it.
    (folder / "other/clients/alice/ca.pem").write_bytes((pki / "ca/ca.pem").read_bytes())
    bare = pki / "clients/bare"
    bare.mkdir()
    (bare / "ca.pem").write_bytes((pki / "ca/ca.pem").read_bytes())
    write_tokens(tokens, f"alice {ALICE}", f"bob {BOB}", f"alice {EXPIRED} 2020-01-31")
    flags = ["--tls", str(pki / "server"), "--tokens", str(tokens), "--log-level", "debug"]
    site = Site(start_daemon(folder, *flags), pki, tokens)
    yield site
    site.daemon.process.terminate()
    assert site.daemon.process.wait(timeout=PATIENCE_S) == 0
    log = site.daemon.log()
    assert "serving" in log and "PRIVATE KEY" not in log
    # Nor do strangers' failed handshakes put anything else between the lines of JSON.
    assert all("message" in json.loads(line) for line in log.splitlines())
    assert not [token for token in (ALICE, BOB, EXPIRED, UNKNOWN) if token in log]


def test_a_certificate_and_a_token_let_in(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text(ALICE + "\n")
    (tmp_path / "token").chmod(0o600)
    monkeypatch.setenv("TRUNKLINE_TLS", str(site.pki / "clients/alice"))
    monkeypatch.setenv("TRUNKLINE_TOKEN_FILE", str(tmp_path / "token"))
    with open_channel(site.daemon.address) as channel:
        assert get_info(channel, site.daemon.address, timeout_s=PATIENCE_S).model_type == "gpt2"
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "liveness", "readiness", "trunkline.v1.TrunkService"):
            answer = health.Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize(
    "folder",
    [
        pytest.param(None, id="plain"),
        pytest.param("pki/clients/bare", id="no certificate"),
        pytest.param("other/clients/alice", id="another CA's"),
        pytest.param("pki/clients/late", id="expired"),
        pytest.param("pki/server", id="the server's own"),
    ],
)
def test_without_a_certificate_of_its_ca_nobody_is_let_in(site: Site, folder: str | None) -> None:
    tls = None if folder is None else site.pki.parent / folder
    with pytest.raises(TrunkUnavailableError, match=REFUSED_BY_TLS):
        site.ask(tls, None if tls is None else ALICE)


@pytest.mark.parametrize(
    ("token", "said"),
    [
        (None, "no token"),
        ("", "not accepted"),
        (UNKNOWN, "not accepted"),
        (ALICE[:-1], "not accepted"),
        (EXPIRED, "the token has expired"),
    ],
)
def test_without_its_token_a_certificate_does_not_do(
    site: Site, token: str | None, said: str
) -> None:
    with pytest.raises(AuthenticationError, match=said) as caught:
        site.ask(site.pki / "clients/alice", token)
    assert not token or token not in str(caught.value)


def test_a_token_that_is_removed_stops_at_the_next_call(site: Site) -> None:
    bob, before = site.pki / "clients/bob", site.tokens.read_text(encoding="utf-8")
    assert site.ask(bob, BOB).num_layers == 12
    replace(site.tokens, before.replace(f"bob {BOB}\n", ""))
    with pytest.raises(AuthenticationError, match="not accepted"):
        site.ask(bob, BOB)
    replace(site.tokens, before.replace("bob ", "b b "))
    with pytest.raises(AuthenticationError, match="not accepted"):
        site.ask(bob, BOB)
    assert "line 4: a token is 16 to 512" in site.daemon.log()
    replace(site.tokens, before)
    assert site.ask(bob, BOB).num_layers == 12


def test_a_renewed_server_certificate_needs_no_restart(site: Site) -> None:
    server = site.pki / "server"
    assert presented(site.daemon) == pem(server)
    server.rename(server.with_name("old"))
    assert presented(site.daemon) == pem(server.with_name("old"))
    write_certificates(site.pki)
    assert presented(site.daemon) == pem(server) != pem(server.with_name("old"))
    assert site.ask(site.pki / "clients/alice", ALICE).num_layers == 12


def pem(folder: Path) -> str:
    return (folder / "cert.pem").read_text().strip()


def presented(daemon: Daemon) -> str:
    """The certificate that the daemon shows to a new connection."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    host, _, port = daemon.address.rpartition(":")
    with (
        socket.create_connection((host, int(port))) as plain,
        context.wrap_socket(plain) as wrapped,
    ):
        der = wrapped.getpeercert(binary_form=True)
    assert der is not None
    return ssl.DER_cert_to_PEM_cert(der).strip()


def test_a_tenants_certificate_does_not_pass_for_the_trunks(tmp_path: Path) -> None:
    write_certificates(tmp_path / "pki", tenants=["alice", "mallory"])
    files = read_tls_folder(tmp_path / "pki/clients/mallory")
    server = grpc.server(ThreadPoolExecutor(1))
    credentials = grpc.ssl_server_credentials([(files.key_pem, files.cert_pem)])
    address = f"localhost:{server.add_secure_port('localhost:0', credentials)}"
    server.start()
    alice = Credentials(tmp_path / "pki/clients/alice")
    with (
        open_channel(address, alice) as channel,
        pytest.raises(TrunkUnavailableError, match="TLS was not agreed on"),
    ):
        get_info(channel, address, timeout_s=PATIENCE_S)
    server.stop(None)


def test_other_hosts_are_not_served_without_tls() -> None:
    command = [sys.executable, "-m", "trunk_service", "--listen", "0.0.0.0:0"]
    expected = {
        (): "needs TLS with client certificates; accepted: --tls DIR",
        ("--insecure",): "--insecure works on a loopback address only",
    }
    started = {
        flags: subprocess.Popen([*command, *flags], stderr=subprocess.PIPE, text=True)
        for flags in expected
    }
    for flags, process in started.items():
        _, errors = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 2
        assert expected[flags] in errors and "Traceback" not in errors


def test_insecure_turns_off_what_is_set_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRUNKD_TLS", "/no/such/folder")
    monkeypatch.setenv("TRUNKD_TOKENS", "/no/such/file")
    daemon = start_daemon(tmp_path, "--insecure")
    with open_channel(daemon.address) as channel:
        assert get_info(channel, daemon.address, timeout_s=PATIENCE_S).num_layers == 12
        assert channel.unary_unary(f"{SERVICE}/GetInfo")(b"", timeout=PATIENCE_S)
    entries = [json.loads(line) for line in daemon.log().splitlines()]
    said = "TLS (set to /no/such/folder), client certificates, tokens (set to /no/such/file)"
    assert said in entries[0]["message"]
    assert entries[1]["off"] == ["TLS", "client certificates", "tokens"]
    daemon.process.terminate()
    assert daemon.process.wait(timeout=PATIENCE_S) == 0


def test_a_client_sends_nothing_plain_to_another_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRUNKLINE_TLS", raising=False)
    for address in ("192.0.2.1:50052", "trunk:50052", "[2001:db8::1]:50052"):
        with pytest.raises(InvalidInputError, match="reached with TLS only"):
            open_channel(address)
    monkeypatch.setenv("TRUNKLINE_TOKEN_FILE", "/some/token")
    with pytest.raises(InvalidInputError, match="sent inside TLS only"):
        open_channel("127.0.0.1:50052")
