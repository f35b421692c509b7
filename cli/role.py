"""`twostroke role`: change the role of a worker while it serves."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import typer

from ..cli import options as o
from ..client.client import Client
from ..cluster.operations.operator import Operator
from ..cluster.operations.standins import check_stand_in
from ..core.request import Role
from .processes import check_operators_key
from .status import ApiKey, Ca, Cert, Grpc, Insecure, Key, tls_of


def role(
    worker: Annotated[str, typer.Argument(help="Its name, as `twostroke status` shows it.")],
    new_role: Annotated[Role, typer.Argument(metavar="ROLE", help="prefill, decode or combined.")],
    grpc: Grpc = "127.0.0.1:8001",
    api_key: ApiKey = None,
    insecure: Insecure = False,
    tls_ca: Ca = None,
    tls_cert: Cert = None,
    tls_key: Key = None,
    config: o.ConfigFile = None,
    force: Annotated[bool, typer.Option("--force", help="Also where no other worker of its model decodes.")] = False,
) -> None:
    """Change a worker's role; what it runs goes on, and the routers follow at once. `serve` restarts it with this role.

    The cluster's key is TWOSTROKE__CLUSTER__KEY: only a cluster that was started with one changes roles by hand.
    """
    settings = o.config_from({"config": config})
    check_operators_key(settings)
    tls = tls_of(tls_ca)
    with Client(grpc, api_key=api_key, insecure=insecure, tls=tls, cert=tls_cert, key=tls_key, timeout_s=5.0) as client:
        workers = client.cluster()["workers"]
    address = _address(workers, worker, new_role, force=force)
    asyncio.run(Operator(settings.cluster.key, settings.cluster.tls).set_role(address, new_role))
    typer.echo(f"{worker} is {new_role.value}")


def _address(workers: list[dict[str, Any]], name: str, new_role: Role, *, force: bool) -> str:
    """Find the address of the worker.

    Raises:
        InvalidRequest: no worker has this name.
        ConfigError: no live worker would be left that decodes its model, and `force` is not set.
    """
    is_safe = force or new_role is not Role.PREFILL
    return str(check_stand_in(workers, name, "a prefill worker", force=is_safe)["address"])
