"""The command `twostroke`: serve, up, down, status, role, drain, restart, chat, keys, …: a file for each."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from ..cli import certs, chat, down, drain, explain, quantize, restart, role, serve, status, up
from ..cli import processes as members
from ..core.errors import TwostrokeError
from .arguments import translated
from .failure import fail
from .keys import app as keys_app
from .simulation.sim import app as sim_app

app = typer.Typer(
    name="twostroke",
    help="A disaggregated serving cluster for large language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        typer.echo(f"twostroke {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Say it.")] = False,
) -> None:
    pass


app.command()(serve.serve)
app.command()(up.up)
app.command()(down.down)
app.command()(members.worker)
app.command()(members.router)
app.command()(members.planner)
app.command()(status.status)
app.command()(explain.explain)
app.command()(role.role)
app.command()(drain.drain)
app.command()(drain.undrain)
app.command()(restart.restart)
app.command()(chat.chat)
app.command()(certs.certs)
app.command()(quantize.quantize)
app.add_typer(keys_app, name="keys")
app.add_typer(sim_app, name="sim")


def main() -> None:
    """Run a command; a typed error becomes one line and exit code 2."""
    try:
        app(translated(sys.argv[1:], lambda line: typer.echo(f"twostroke: {line}", err=True)))
    except TwostrokeError as error:
        fail(error)


if __name__ == "__main__":
    main()
