"""Certificate authority of a cluster: certificates of its roles, in a folder or for one run.

Importing this file raises ConfigError where the library `cryptography` is missing: only who makes certificates needs
it.

    ca.pem       certificates of the authorities that are trusted, the newest first
    ca.key       the newest authority's private key; no process of the cluster needs it
    ROLE.pem     certificate of a router, worker or operator
    ROLE.key     its private key

Keys are readable by their owner alone. Every file is replaced at once, so that no reader sees half of one.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..core.errors import ConfigError
from ..core.tls.callers import Caller, name_of, uri_of
from ..core.tls.config import TlsConfig

try:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
except ImportError:
    raise ConfigError("certificates are made with the library `cryptography`: pip install 'twostroke[certs]'") from None

CA_DAYS = 3650
RUN_DAYS = 3650  # certificates of one run end with it: its authority's key is in no file and forgotten at once
SKEW = datetime.timedelta(minutes=5)  # of the clocks of two machines
MAX_AUTHORITIES = 2  # that are trusted at once: the newest and the one before


class Authority:
    """A certificate authority that can sign for one deployment."""

    def __init__(self, deployment: str, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        self.deployment = deployment
        self.certificate = certificate
        self._key = key

    @classmethod
    def new(cls, deployment: str, days: float = CA_DAYS, now: datetime.datetime | None = None) -> Authority:
        """Make an authority that is valid from `now` on."""
        now = now or _now()
        key = ec.generate_private_key(ec.SECP256R1())
        name = _name(f"twostroke {deployment} {secrets.token_hex(4)}")  # two authorities differ by their names
        usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)  # signs certificates, CRLs
        certificate = (
            _builder(name, name, key.public_key(), now, days)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        return cls(deployment, certificate, key)

    @property
    def pem(self) -> bytes:
        """The authority's own certificate."""
        return _pem(self.certificate)

    @property
    def key_pem(self) -> bytes:
        """Its private key."""
        return _key_pem(self._key)

    def issue(
        self, caller: Caller, days: float, hosts: Iterable[str] = (), now: datetime.datetime | None = None
    ) -> tuple[bytes, bytes]:
        """Make the certificate of a role, for servers and clients; returns it and its private key.

        `hosts`: more names or addresses of its servers. It ends with the authority at the latest.
        """
        now = now or _now()
        left = (self.certificate.not_valid_after_utc - now) / datetime.timedelta(days=1)
        key = ec.generate_private_key(ec.SECP256R1())
        names: list[x509.GeneralName] = [
            x509.DNSName(name_of(self.deployment, caller)),
            x509.UniformResourceIdentifier(uri_of(self.deployment, caller)),
        ]
        names += [_general_name(host) for host in hosts]
        usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        issuer = x509.SubjectKeyIdentifier.from_public_key(self._key.public_key())
        certificate = (
            _builder(_name(f"twostroke {caller}"), self.certificate.subject, key.public_key(), now, min(days, left))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return _pem(certificate), _key_pem(key)


def make(directory: Path, deployment: str, days: float, hosts: Sequence[str]) -> None:
    """Make an authority and the certificates of all roles in a folder. `hosts`: of the router's public faces.

    Raises:
        ConfigError: there are certificates already, a host is no name, or the folder cannot be written.
    """
    if (directory / "ca.pem").exists():
        raise ConfigError(f"{directory} has certificates already; --renew makes new ones of the same authority")
    authority = Authority.new(deployment)
    _into(directory)
    _write(directory / "ca.key", authority.key_pem, 0o600)
    _write(directory / "ca.pem", authority.pem, 0o644)
    _issue_all(directory, authority, days, hosts)


def renew(directory: Path, days: float, hosts: Sequence[str] = ()) -> None:
    """Make new certificates of all roles, signed by the newest authority. Without `hosts`: for the same hosts.

    Raises:
        ConfigError: there is no authority, or it has expired.
    """
    authority = _loaded(directory)
    if authority.certificate.not_valid_after_utc <= _now():
        raise ConfigError(f"the authority in {directory} has expired; --renew-ca makes a new one")
    _issue_all(directory, authority, days, hosts or _hosts_of(directory / "router.pem"))


def renew_authority(directory: Path) -> None:
    """Make a new authority that is trusted beside the one before; it has signed nothing yet.

    The certificates of all processes stay valid. When every process has the new ca.pem, `renew` uses the new authority.
    """
    authority = Authority.new(_loaded(directory).deployment)
    before = _certificates(directory / "ca.pem")[: MAX_AUTHORITIES - 1]
    _write(directory / "ca.pem", authority.pem + b"".join(_pem(each) for each in before), 0o644)
    _write(directory / "ca.key", authority.key_pem, 0o600)


def of_one_run(deployment: str) -> dict[Caller, TlsConfig]:
    """Certificates of all roles, as texts, of an authority that nobody can use again."""
    authority = Authority.new(deployment, RUN_DAYS + 1)
    found = {}
    for caller in Caller:
        chain, key = authority.issue(caller, RUN_DAYS)
        found[caller] = TlsConfig(
            ca=authority.pem.decode(), cert=chain.decode(), key=key.decode(), deployment=deployment
        )
    return found


# ---------------------------------------------------------------- files


def _issue_all(directory: Path, authority: Authority, days: float, hosts: Sequence[str]) -> None:
    for caller in Caller:
        chain, key = authority.issue(caller, days, hosts if caller is Caller.ROUTER else ())
        _write(directory / f"{caller}.key", key, 0o600)
        _write(directory / f"{caller}.pem", chain, 0o644)


def _into(directory: Path) -> None:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{directory} cannot be made: {error.strerror}") from None


def _write(path: Path, content: bytes, mode: int) -> None:
    """Replace a file at once; no other user can read it before it has its mode."""
    unnamed = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        descriptor = os.open(unnamed, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            os.fchmod(file.fileno(), mode)
        unnamed.replace(path)
    except OSError as error:
        unnamed.unlink(missing_ok=True)
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from None


def _loaded(directory: Path) -> Authority:
    """The newest authority of a folder.

    Raises:
        ConfigError: there is none, or its key is missing or another's.
    """
    certificate = _certificates(directory / "ca.pem")[0]
    path = directory / "ca.key"
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        why = getattr(error, "strerror", None) or "it is no private key"
        raise ConfigError(f"{path} cannot be read: {why}; it signs the new certificates") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise ConfigError(f"{path} is not the key of the first certificate in ca.pem")
    return Authority(_deployment_of(directory / "router.pem"), certificate, key)


def _certificates(path: Path) -> list[x509.Certificate]:
    try:
        return list(x509.load_pem_x509_certificates(path.read_bytes()))
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "it holds no certificate"
        raise ConfigError(f"{path} cannot be read: {why}; `twostroke certs DIR` makes it") from None


def _names(path: Path) -> x509.SubjectAlternativeName:
    return _certificates(path)[0].extensions.get_extension_for_class(x509.SubjectAlternativeName).value


def _deployment_of(path: Path) -> str:
    uri = _names(path).get_values_for_type(x509.UniformResourceIdentifier)[0]
    return uri.split("/")[-2]


def _hosts_of(path: Path) -> list[str]:
    """Hosts for which the router's certificate was made."""
    names = _names(path)
    own = name_of(_deployment_of(path), Caller.ROUTER)
    named = [name for name in names.get_values_for_type(x509.DNSName) if name != own]
    return named + [str(address) for address in names.get_values_for_type(x509.IPAddress)]


# ---------------------------------------------------------------- parts of a certificate


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:64])])


def _builder(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, now: datetime.datetime, days: float
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SKEW)
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    if not host.isascii() or not host or any(character in host for character in "/: ") or len(host) > 253:
        raise ConfigError(f"--hosts has {host!r}; it takes names and addresses, without scheme and port")
    return x509.DNSName(host)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
