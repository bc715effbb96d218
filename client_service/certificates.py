"""A certificate authority of one's own, for one trunk and its tenants.

::

    DIR/ca/{ca.pem,ca-key.pem}                  stays with whoever admits tenants
    DIR/server/{ca.pem,cert.pem,key.pem}        for trunkd --tls
    DIR/client/… or DIR/clients/NAME/…          for trunkline --tls
"""

from __future__ import annotations

import ipaddress
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from shared.errors import InvalidInputError
from shared.new_folder import new_folder

LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")

_CA_DAYS = 3650
_CLOCK_SKEW = timedelta(minutes=5)
_TENANT_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,63}")  # also a folder's name
_LONGEST_HOST = 253
_HOST_NAME = re.compile(r"(\*\.)?[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")


@dataclass(frozen=True)
class Authority:
    """A CA that can sign."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def pem(self) -> bytes:
        """The certificate, for those who shall trust it."""
        return self.certificate.public_bytes(Encoding.PEM)


def write_certificates(
    out: Path, hosts: Sequence[str] = (), tenants: Sequence[str] = (), days: int = 90
) -> list[Path]:
    """Writes a CA with the server's and the clients' certificates, or adds tenants to one.

    Args:
        out: New folder; or one written before, to which only what it lacks is added.
        hosts: Names or IP addresses that clients reach the trunk by, beside this machine's own.
        tenants: Their names, one certificate each; without any, one client named ``client``.
        days: How long server and clients are accepted.

    Returns:
        The folders that were written.

    Raises:
        InvalidInputError: If a name is unusable, something would be overwritten, or the disk
            refuses; nothing is written then.
    """
    names = _checked_hosts(hosts)
    for tenant in tenants:
        if not _TENANT_NAME.fullmatch(tenant):
            raise InvalidInputError(
                f"tenant {tenant!r}: accepted are 1 to 64 letters, digits or any of _ - . and no "
                "dot in front"
            )
    wanted = {tenant: f"clients/{tenant}" for tenant in tenants}
    if not _is_ours(out):
        with new_folder(out) as folder:
            wanted = wanted or {"client": "client"}
            written = ["ca", *_issue_all(_new_authority(folder), folder, names, wanted, days)]
    else:
        _check_place(out, [out / name for name in wanted.values()], hosts)
        written = _issue_all(_read_authority(out), out, names, wanted, days)
    return [out / name for name in written]


def _issue_all(
    authority: Authority,
    out: Path,
    hosts: list[x509.GeneralName],
    wanted: Mapping[str, str],
    days: int,
) -> list[str]:
    """Issues the server's certificate if it is missing, and the tenants'; all or none."""
    server: list[x509.ExtensionType] = [
        x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]),
        x509.SubjectAlternativeName(hosts),
    ]
    client: list[x509.ExtensionType] = [x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH])]
    to_issue = {} if (out / "server").exists() else {"server": ("trunkd", server)}
    to_issue |= {name: (tenant, client) for tenant, name in wanted.items()}
    written: list[str] = []
    try:
        for name, (common_name, extensions) in to_issue.items():
            _issue(authority, out / name, common_name, extensions, days)
            written.append(name)
    except OSError as error:
        for done in written:
            shutil.rmtree(out / done, ignore_errors=True)
        with suppress(OSError):
            (out / "clients").rmdir()  # if there is no other
        raise InvalidInputError(
            f"{name}: cannot be written ({error.strerror}), and nothing was added; make room"
        ) from error
    return written


def _is_ours(out: Path) -> bool:
    """Whether there is something that may be added to; a new place is not."""
    return os.path.isdir(out) and any(out.iterdir())


def _check_place(out: Path, wanted: Sequence[Path], hosts: Sequence[str]) -> None:
    if not (out / "ca" / "ca-key.pem").is_file():
        raise InvalidInputError(f"{out} is not empty and has no CA of ours; choose another")
    if taken := [str(folder) for folder in wanted if folder.exists()]:
        raise InvalidInputError(f"{taken[0]} exists; remove it first to issue it again")
    if (out / "server").exists():
        if hosts:
            raise InvalidInputError(
                f"{out / 'server'} exists; remove it first to issue it for other hosts"
            )
        if not wanted:
            raise InvalidInputError(
                f"{out} has its certificates; accepted: --tenant NAME to add one"
            )


def _checked_hosts(hosts: Sequence[str]) -> list[x509.GeneralName]:
    names: list[x509.GeneralName] = []
    for host in dict.fromkeys((*LOCAL_HOSTS, *hosts)):
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            if not _HOST_NAME.fullmatch(host) or len(host) > _LONGEST_HOST:
                raise InvalidInputError(
                    f"host {host!r} is neither a host's name nor an IP address (no port)"
                ) from None
            names.append(x509.DNSName(host))
    return names


def _new_authority(out: Path) -> Authority:
    key = ec.generate_private_key(ec.SECP256R1())
    # A name of its own: two CAs of one name are hard to tell apart in an error.
    name = _name(f"trunkline CA {x509.random_serial_number():x}"[:24])
    certificate = (
        _builder(name, name, key.public_key(), datetime.now(UTC) + timedelta(days=_CA_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    authority = Authority(certificate, key)
    _write_folder(out / "ca", {"ca.pem": authority.pem, "ca-key.pem": _key_pem(key)})
    return authority


def _read_authority(out: Path) -> Authority:
    folder = out / "ca"
    try:
        certificate = x509.load_pem_x509_certificate((folder / "ca.pem").read_bytes())
        key = load_pem_private_key((folder / "ca-key.pem").read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise InvalidInputError(f"{folder}: ca.pem and ca-key.pem cannot be read") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise InvalidInputError(f"{folder / 'ca-key.pem'} is not a key that trunkline wrote")
    return Authority(certificate, key)


def _issue(
    authority: Authority,
    folder: Path,
    common_name: str,
    extensions: Sequence[x509.ExtensionType],
    days: int,
) -> Path:
    key = ec.generate_private_key(ec.SECP256R1())
    issuer, signer = authority.certificate, authority.key
    end = min(datetime.now(UTC) + timedelta(days=days), issuer.not_valid_after_utc)
    builder = _builder(_name(common_name), issuer.subject, key.public_key(), end)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), True)
    builder = builder.add_extension(_key_usage(signs_certificates=False), critical=True)
    subject = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    of_issuer = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(subject)
    for extension in (of_issuer, *extensions):
        builder = builder.add_extension(extension, critical=False)
    certificate = builder.sign(signer, hashes.SHA256())
    files = {
        "ca.pem": authority.pem,
        "cert.pem": certificate.public_bytes(Encoding.PEM),
        "key.pem": _key_pem(key),
    }
    return _write_folder(folder, files)


def _builder(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, end: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        # The other end's clock may be a little behind.
        .not_valid_before(datetime.now(UTC) - _CLOCK_SKEW)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _key_usage(signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _write_folder(folder: Path, files: Mapping[str, bytes]) -> Path:
    """Writes a folder that appears whole, its keys readable by their owner alone.

    Raises:
        OSError: As the disk says; nothing is left of it.
    """
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True, mode=0o755)
        for name, content in files.items():
            mode = 0o600 if name.endswith("key.pem") else 0o644
            opened = os.open(partial / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            with os.fdopen(opened, "wb") as file:
                file.write(content)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder
