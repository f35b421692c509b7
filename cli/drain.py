"""`twostroke drain`: a worker takes no new work, ends what it has, and goes; `twostroke undrain`: it stays."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Annotated, Any

import typer

from ..cli import options as o
from ..client.client import Client
from ..cluster.operations.control import Answer, command, told
from ..cluster.operations.operator import Operator
from ..cluster.operations.standins import check_stand_in
from ..core.errors import InvalidRequest, TwostrokeError
from ..core.request import Role
from .processes import check_operators_key
from .status import ApiKey, Ca, Cert, Grpc, Insecure, Key, tls_of
from .supervised import refuse_without_supervisor, running_folder_of

MARGIN_S = 60.0  # beyond the drain itself, for the end of the process
PROGRESS_S = 1.0
ANSWER_S = 15.0


def drain(
    worker: Annotated[str, typer.Argument(help="Its name, as `twostroke status` shows it.")],
    timeout: Annotated[
        float, typer.Option(min=0, help="Seconds for its streams to end; the others go on at other workers then.")
    ] = 60.0,
    grpc: Grpc = "127.0.0.1:8001",
    api_key: ApiKey = None,
    insecure: Insecure = False,
    tls_ca: Ca = None,
    tls_cert: Cert = None,
    tls_key: Key = None,
    config: o.ConfigFile = None,
    force: Annotated[bool, typer.Option("--force", help="Also where no other worker of its model decodes.")] = False,
) -> None:
    """Drain a worker and wait. Exit code 0: all its streams ended; 1: some went on at other workers; 2: refused.

    Where `serve` or `up` runs on this machine, the worker's process ends too and is not restarted. Elsewhere the
    process stays, for its owner (a kubelet) to end; that needs the cluster's key, TWOSTROKE__CLUSTER__KEY.
    """
    folder = running_folder_of(grpc)
    if folder is not None:
        asked = {"verb": "drain", "worker": worker, "timeout_s": timeout, "force": force}
        answer = asyncio.run(command(folder.socket, asked, _say, timeout + MARGIN_S))
    else:
        refuse_without_supervisor(grpc)
        settings = o.config_from({"config": config})
        check_operators_key(settings)
        tls = tls_of(tls_ca)
        with Client(
            grpc, api_key=api_key, insecure=insecure, tls=tls, cert=tls_cert, key=tls_key, timeout_s=5.0
        ) as client:
            operator = Operator(settings.cluster.key, settings.cluster.tls)
            answer = asyncio.run(_drain(client, operator, worker, timeout, force=force))
    typer.echo(answer.said, err=answer.code != 0)
    raise typer.Exit(answer.code)


def undrain(
    worker: Annotated[str, typer.Argument(help="Its name, as `twostroke status` shows it.")],
    grpc: Grpc = "127.0.0.1:8001",
    api_key: ApiKey = None,
    insecure: Insecure = False,
    tls_ca: Ca = None,
    tls_cert: Cert = None,
    tls_key: Key = None,
    config: o.ConfigFile = None,
) -> None:
    """Undo `twostroke drain`, while the worker's process has not ended. Exit code 0: it takes work again; 2: refused.

    Where `serve` or `up` runs on this machine, `drain` must still be waiting. Elsewhere the process stays after a drain
    until its owner ends it, so it can be taken back at any time; that needs the cluster's key, TWOSTROKE__CLUSTER__KEY.
    """
    folder = running_folder_of(grpc)
    if folder is not None:
        asked = {"verb": "undrain", "worker": worker}
        answer = asyncio.run(command(folder.socket, asked, typer.echo, ANSWER_S))
        typer.echo(answer.said, err=answer.code != 0)
        raise typer.Exit(answer.code)
    refuse_without_supervisor(grpc)
    settings = o.config_from({"config": config})
    check_operators_key(settings)
    tls = tls_of(tls_ca)
    with Client(grpc, api_key=api_key, insecure=insecure, tls=tls, cert=tls_cert, key=tls_key, timeout_s=5.0) as client:
        addresses = {each["worker_id"]: str(each["address"]) for each in client.cluster()["workers"]}
    if worker not in addresses:
        raise InvalidRequest(f"no worker is called {worker!r}; there are: {', '.join(sorted(addresses)) or 'none'}")
    asyncio.run(Operator(settings.cluster.key, settings.cluster.tls).undrain(addresses[worker]))
    typer.echo(f"{worker} takes work again")


def _say(line: str) -> None:
    typer.echo(line, err=True)


async def _drain(client: Client, operator: Operator, name: str, timeout_s: float, *, force: bool) -> Answer:
    """Drain a worker that no supervisor of this machine has started."""
    report = _report(await asyncio.to_thread(client.cluster), name, force=force)
    draining = asyncio.create_task(operator.drain(str(report["address"]), timeout_s))
    try:
        while not (await asyncio.wait({draining}, timeout=PROGRESS_S))[0]:
            with contextlib.suppress(TwostrokeError, InvalidRequest):
                load = _report(await asyncio.to_thread(client.cluster), name, force=True)["load"]
                _say(f"{name} drains: {load['running']} sequences run, {load['waiting']} wait")
        return told(name, draining.result(), "", "its process stays")
    finally:
        draining.cancel()


def _report(cluster: dict[str, Any], name: str, *, force: bool) -> dict[str, Any]:
    """The router's report on the worker.

    Raises:
        InvalidRequest, ConfigError: there is none, or it alone decodes.
    """
    workers = cluster["workers"]
    prefills = any(w["worker_id"] == name and w["role"] == Role.PREFILL.value for w in workers)
    return dict(check_stand_in(workers, name, "a drained worker", force=force or prefills))
