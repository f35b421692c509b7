"""Who may call which method inside a cluster, by the role in a certificate. Pure.

A certificate names its holder by a URI, as SPIFFE does: spiffe://twostroke/DEPLOYMENT/ROLE. It has a DNS name too,
ROLE.DEPLOYMENT.twostroke.internal, because TLS libraries check the name of a server and not its URI. No DNS server
knows that name.

Source of the URI's form: SPIFFE ID 1.0, section 2.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum


class Caller(StrEnum):
    """Role in a certificate. Whether a worker prefills or decodes is data that changes, so it is not in it."""

    ROUTER = "router"
    WORKER = "worker"
    OPERATOR = "operator"  # a person or a program that manages the cluster: status, role, drain


_EVERYBODY = frozenset(Caller)

ALLOWED: dict[str, frozenset[Caller]] = {
    "/twostroke.v1.Announce/Announce": frozenset({Caller.WORKER}),
    "/twostroke.v1.Peers/Explain": frozenset({Caller.ROUTER}),
    "/twostroke.v1.Peers/Abort": frozenset({Caller.ROUTER}),
    "/twostroke.v1.Peers/Follow": frozenset({Caller.ROUTER}),
    "/twostroke.v1.Peers/FindKey": frozenset({Caller.ROUTER}),
    "/twostroke.v1.Peers/Forget": frozenset({Caller.ROUTER}),
    "/twostroke.v1.Peers/Report": frozenset({Caller.ROUTER, Caller.OPERATOR}),
    "/twostroke.v1.Peers/Metrics": frozenset({Caller.ROUTER}),
    "/twostroke.v1.Announce/Report": frozenset({Caller.OPERATOR}),
    "/twostroke.v1.Worker/Session": frozenset({Caller.ROUTER}),
    "/twostroke.v1.Worker/Watch": frozenset({Caller.ROUTER}),
    "/twostroke.v1.Worker/Describe": frozenset({Caller.ROUTER, Caller.OPERATOR}),
    "/twostroke.v1.Worker/Drain": frozenset({Caller.OPERATOR}),
    "/twostroke.v1.Worker/Undrain": frozenset({Caller.OPERATOR}),
    "/twostroke.v1.Worker/SetRole": frozenset({Caller.OPERATOR}),
    "/twostroke.v1.Worker/LoadAdapter": frozenset({Caller.ROUTER, Caller.OPERATOR}),
    "/twostroke.v1.Worker/UnloadAdapter": frozenset({Caller.ROUTER, Caller.OPERATOR}),
    "/twostroke.v1.Handover/Transfer": frozenset({Caller.WORKER}),
    "/twostroke.v1.Handover/Pair": frozenset({Caller.WORKER}),
    "/twostroke.v1.Blocks/Fetch": frozenset({Caller.WORKER}),
    "/twostroke.v1.Blocks/Keep": frozenset({Caller.WORKER}),
    "/grpc.health.v1.Health/Check": _EVERYBODY,
    "/grpc.health.v1.Health/Watch": _EVERYBODY,
    "/grpc.health.v1.Health/List": _EVERYBODY,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": frozenset({Caller.OPERATOR}),
}
"""Callers of each method of the servers inside. A method that is not here is refused to everybody."""


def uri_of(deployment: str, caller: Caller) -> str:
    """URI in the certificate of one role."""
    return f"spiffe://twostroke/{deployment}/{caller}"


def name_of(deployment: str, caller: Caller) -> str:
    """DNS name in the certificate of one role, which its callers expect."""
    return f"{caller}.{deployment}.twostroke.internal"


def caller_in(names: Iterable[str], deployment: str) -> Caller | None:
    """Role that a certificate's names give its holder in this deployment. None: none, or more than one."""
    uris = {uri_of(deployment, caller): caller for caller in Caller}
    found = {uris[name] for name in names if name in uris}
    return found.pop() if len(found) == 1 else None


def may_call(caller: Caller | None, method: str) -> bool:
    """Return whether a role may call a method, "/package.Service/Method"."""
    return caller is not None and caller in ALLOWED.get(method, frozenset())
