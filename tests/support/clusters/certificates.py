"""Certificates for tests: a folder as `twostroke certs` makes it, and certificates that must be refused."""

import datetime
from pathlib import Path

from twostroke.cluster.authority import Authority, make
from twostroke.core.tls.callers import Caller
from twostroke.core.tls.config import TlsConfig
from twostroke.core.tls.handshake import Pem
from twostroke.core.tls.identity import TlsIdentity

DEPLOYMENT = "twostroke"
HOSTS = ("localhost", "127.0.0.1")


def folder_settings(directory: Path) -> TlsConfig:
    """`cluster.tls` for a folder of `twostroke certs`."""
    return TlsConfig(
        ca=str(directory / "ca.pem"), cert=str(directory / "{role}.pem"), key=str(directory / "{role}.key")
    )


def made(directory: Path) -> TlsConfig:
    """Make a folder of certificates; returns its settings."""
    make(directory, DEPLOYMENT, 10, HOSTS)
    return folder_settings(directory)


def issued(
    authority: Authority, caller: Caller, days: float = 10, trusting: Authority | None = None, ago_days: float = 0
) -> Pem:
    """A certificate that an authority signs, of a holder that trusts `trusting`."""
    began = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=ago_days)
    chain, key = authority.issue(caller, days, now=began)
    return Pem((trusting or authority).pem, chain, key)


class Shown(TlsIdentity):
    """An identity that shows whatever it is given, also what a process would not start with."""

    def __init__(self, pem: Pem, own: Caller = Caller.OPERATOR) -> None:
        self.deployment = DEPLOYMENT
        self.own = own
        self.num_failed = 0
        self._diagnoses = {}
        self._shown = pem

    def current(self) -> Pem:
        return self._shown
