"""`twostroke status`: the workers, their roles, load and blocks, as the router sees them."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..client.client import Client

Grpc = Annotated[str, typer.Option("--grpc", help="host:port of the router's gRPC face.")]

ApiKey = Annotated[
    str | None, typer.Option(envvar="TWOSTROKE_API_KEY", help="Where the router asks for one.", show_envvar=True)
]


def status(
    grpc: Grpc = "127.0.0.1:8001",
    api_key: ApiKey = None,
    as_json: Annotated[bool, typer.Option("--json", help="The whole document.")] = False,
) -> None:
    """Show the cluster."""
    with Client(grpc, api_key=api_key, timeout_s=5.0) as client:
        cluster = client.cluster()
    if as_json:
        typer.echo(json.dumps(cluster, indent=2))
        return
    Console().print(_table(cluster))


def _table(cluster: dict[str, Any]) -> Table:
    table = Table(title="workers", title_justify="left")
    for heading in ("worker", "role", "state", "pid", "runs", "waits", "blocks used", "cached", "metrics"):
        # Numbers may wrap, names and addresses never: they are copied. The rest: --json.
        table.add_column(heading, no_wrap=heading in ("worker", "metrics"), overflow="fold")
    for worker in cluster["workers"]:
        load, blocks = worker["load"], worker["blocks"]
        table.add_row(
            worker["worker_id"],
            worker["role"],
            worker["state"],
            str(worker["pid"]),
            str(load["running"]),
            str(load["waiting"]),
            f"{blocks['total'] - blocks['free']:,} of {blocks['total']:,}",
            f"{blocks['cached']:,}",
            worker.get("metrics_address") or "none",
        )
    return table
