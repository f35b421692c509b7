"""`twostroke certs`: make an authority and certificates for the processes of a cluster, or new ones in time."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Annotated

import typer

from ..core.errors import ConfigError
from ..core.tls.config import TlsConfig

LOCAL = ("localhost", "127.0.0.1", "::1")


def certs(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the certificates.")],
    days: Annotated[int, typer.Option(min=1, help="How long the roles' certificates are valid.")] = 365,
    hosts: Annotated[
        str | None,
        typer.Option(help="Names and addresses by which clients call the router, separated by commas."),
    ] = None,
    deployment: Annotated[str | None, typer.Option(help="Name of the cluster (cluster.tls.deployment).")] = None,
    renew: Annotated[
        bool, typer.Option("--renew", help="New certificates of the same authority; running processes take them.")
    ] = False,
    renew_ca: Annotated[
        bool,
        typer.Option(
            "--renew-ca", help="A new authority, trusted beside the old one. Distribute ca.pem, then --renew."
        ),
    ] = False,
) -> None:
    """Make certificates for mutual TLS between routers, workers and operators. Nothing is printed that is secret."""
    from ..cluster import authority

    named = [host for host in (hosts or "").split(",") if host]
    if renew and renew_ca:
        raise ConfigError(
            "--renew-ca comes first and --renew when every process has the new ca.pem; two commands, not one"
        )
    if renew_ca:
        authority.renew_authority(directory)
        typer.echo(f"{directory / 'ca.pem'} has a new authority beside the old one; when all have it, say --renew")
        return
    if renew:
        authority.renew(directory, days, named)
        typer.echo(f"new certificates are in {directory}; running processes take them with their next connections")
        return
    wanted = deployment or TlsConfig.model_fields["deployment"].default
    TlsConfig(ca="-", cert="-", key="-", deployment=wanted)  # checks the name
    authority.make(directory, wanted, days, [*dict.fromkeys([*LOCAL, socket.gethostname(), *named])])
    place = directory.absolute()
    typer.echo(f"certificates of router, worker and operator are in {directory}, valid for {days} days. In --config:\n")
    typer.echo("cluster:\n  tls:")
    typer.echo(f"    ca: {place}/ca.pem\n    cert: {place}/{{role}}.pem\n    key: {place}/{{role}}.key")
    if deployment:
        typer.echo(f"    deployment: {deployment}")
    typer.echo(f"\nFor clients: --ssl-certfile {place}/router.pem --ssl-keyfile {place}/router.key")
    typer.echo("Keep ca.key where no process of the cluster runs; --renew needs it.")
