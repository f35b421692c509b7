"""`twostroke restart --rolling`: new processes for all workers, one after the other, while the cluster serves."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from ..cluster.operations.control import command
from ..core.errors import ConfigError
from .status import Grpc
from .supervised import refuse_without_supervisor, running_folder_of

LONGEST_S = 86_400.0  # every step of it has a deadline of its own (cluster.ready_timeout_s, cluster.drain_timeout_s)


def restart(
    rolling: Annotated[bool, typer.Option("--rolling", help="One worker at a time; nothing else is offered.")] = False,
    grpc: Grpc = "127.0.0.1:8001",
    force: Annotated[
        bool, typer.Option("--force", help="Also a worker that alone decodes, where no second one fits beside it.")
    ] = False,
) -> None:
    """Restart every worker of the cluster that runs on this machine (`serve` or `up`).

    Where both fit, a new worker (with a new name) serves before the old one drains and goes; else a worker goes first
    and comes back. Streams that do not end within cluster.drain_timeout_s go on at other workers.
    """
    if not rolling:
        raise ConfigError("give --rolling: workers restart one at a time; `down` and `up` restart all of it at once")
    folder = running_folder_of(grpc)
    if folder is None:
        refuse_without_supervisor(grpc)
        raise ConfigError(
            f"no cluster of yours runs on this machine at {grpc}; give its --grpc, and elsewhere use what started it "
            "(kubectl rollout restart)"
        )

    def say(line: str) -> None:
        typer.echo(line, err=True)

    answer = asyncio.run(command(folder.socket, {"verb": "restart", "force": force}, say, LONGEST_S))
    typer.echo(answer.said, err=answer.code != 0)
    raise typer.Exit(answer.code)
