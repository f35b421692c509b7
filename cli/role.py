"""`twostroke role`: change the role of a worker while it serves."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import typer

from ..cli import options as o
from ..client.client import Client
from ..cluster.config import ClusterConfig
from ..core.errors import ConfigError, InvalidRequest, Unavailable
from ..core.request import Role
from .processes import check_key
from .status import ApiKey, Ca, Cert, Grpc, Insecure, Key, tls_of

TIMEOUT_S = 10.0


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

    The cluster's key is TWOSTROKE__CLUSTER__KEY: start `serve` with one to change roles by hand.
    """
    settings = o.config_from({"config": config})
    check_key(settings)
    tls = tls_of(tls_ca)
    with Client(grpc, api_key=api_key, insecure=insecure, tls=tls, cert=tls_cert, key=tls_key, timeout_s=5.0) as client:
        workers = client.cluster()["workers"]
    address = _address(workers, worker, new_role, force=force)
    asyncio.run(_set_role(address, settings.cluster, new_role))
    typer.echo(f"{worker} is {new_role.value}")


def _address(workers: list[dict[str, Any]], name: str, new_role: Role, *, force: bool) -> str:
    """Find the address of the worker.

    Raises:
        InvalidRequest: no worker has this name.
        ConfigError: no live worker would be left that decodes its model, and `force` is not set.
    """
    found = {worker["worker_id"]: worker for worker in workers}
    if name not in found:
        raise InvalidRequest(f"no worker is called {name!r}; there are: {', '.join(sorted(found)) or 'none'}")
    model = found[name]["model"]
    others = [
        w
        for n, w in found.items()
        if n != name and w["model"] == model and w["role"] != Role.PREFILL.value and w["state"] == "live"
    ]
    if new_role is Role.PREFILL and not others and not force:
        raise ConfigError(
            f"{name} alone decodes {model}: as a prefill worker it would leave nobody to answer. Give another worker "
            "the role decode or combined first, or say --force"
        )
    return str(found[name]["address"])


async def _set_role(address: str, cluster: ClusterConfig, new_role: Role) -> None:
    """Send the new role to the worker.

    Raises:
        Unavailable: it did not answer, the keys differ, or it refuses our certificate.
        ConfigError: there is no valid certificate of an operator.
    """
    import grpc.aio

    from ..core.inside import InsideChannel
    from ..core.tls.callers import Caller
    from ..core.tls.identity import TlsIdentity
    from ..kv.keys import proof_key
    from ..kv.messages import role_to_wire
    from ..protos import worker_pb2, worker_pb2_grpc

    tls = TlsIdentity(cluster.tls, Caller.OPERATOR) if cluster.tls else None
    async with InsideChannel(address, proof_key(cluster.key), tls=tls) as channel:
        stub = worker_pb2_grpc.WorkerStub(channel)
        try:
            await stub.SetRole(worker_pb2.SetRoleRequest(role=role_to_wire(new_role)), timeout=TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise Unavailable(f"the worker at {address} did not change its role: {error.details()}") from None
