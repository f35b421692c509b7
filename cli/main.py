"""The command `twostroke`: serve, up, down, status, role, drain, restart, chat, keys, …: a file for each."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Sequence
from typing import Annotated, NamedTuple

import typer

from ..core.errors import TwostrokeError
from ..core.process_settings import uncollected
from .arguments import translated
from .failure import fail


class Command(NamedTuple):
    """A command, or a group of them, as `twostroke --help` lists it."""

    module: str  # of this folder
    summary: str  # the first line of its docstring


COMMANDS = {
    "serve": Command("serve", "Start a cluster on this machine and serve until Ctrl-C."),
    "up": Command("up", "Start a cluster on this machine and return when it serves; `twostroke down` ends it."),
    "down": Command(
        "down",
        "Drain and end the cluster at this address of its gRPC API; nothing of it is left. Without one it says so.",
    ),
    "worker": Command(
        "processes", "Run one worker and announce it to the routers. The cluster's key is TWOSTROKE__CLUSTER__KEY."
    ),
    "router": Command(
        "processes", "Run one router: both client faces, and the port where workers announce themselves."
    ),
    "planner": Command(
        "processes",
        "Scale the Deployments or the DisaggregatedSet of workers by the load, and change workers' roles.",
    ),
    "status": Command("status", "Show the cluster."),
    "explain": Command(
        "explain",
        "Show the candidates of a request's routing with the terms of their cost, and the timeline of all its "
        "attempts.",
    ),
    "role": Command(
        "role",
        "Change a worker's role; what it runs goes on, and the routers follow at once. `serve` restarts it with this "
        "role.",
    ),
    "drain": Command(
        "drain",
        "Drain a worker and wait. Exit code 0: all its streams ended; 1: some went on at other workers; 2: refused.",
    ),
    "undrain": Command(
        "drain",
        "Undo `twostroke drain`, while the worker's process has not ended. Exit code 0: it takes work again; 2: "
        "refused.",
    ),
    "restart": Command("restart", "Restart every worker of the cluster that runs on this machine (`serve` or `up`)."),
    "chat": Command(
        "chat",
        "Chat, turn by turn. Ctrl-C stops an answer; Ctrl-D or an empty line ends. Exit code 1: the last one failed.",
    ),
    "certs": Command(
        "certs",
        "Make certificates for mutual TLS between routers, workers and operators. Nothing is printed that is secret.",
    ),
    "quantize": Command(
        "quantize",
        "Quantise a checkpoint layer by layer, and report what it costs. A killed run goes on when it is started "
        "again.",
    ),
    "keys": Command("keys", "API keys of clients."),
    "sim": Command("simulation.sim", "Run the production machines under a virtual clock."),
}  # in the order of --help


def program(arguments: Sequence[str]) -> typer.Typer:
    """The command line with the command that the arguments name; if they name none, all commands by their summaries.

    Nothing of other commands is imported: `chat` has no use for the modules of a supervisor, nor a worker's process for
    either, and each group of modules takes a part of a second.
    """
    asked = next((word for word in arguments if not word.startswith("-")), None)  # options of the root take no values
    if asked in COMMANDS:
        return _with_commands([asked])
    app = _root()
    for name, command in COMMANDS.items():
        app.command(name, help=command.summary)(_listed)
    return app


def __getattr__(name: str) -> typer.Typer:
    """`app`: the command line with all commands, made on first use."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = made = _with_commands(COMMANDS)
    return made


def run(app: typer.Typer) -> None:
    """Run the command that this process was given; a typed error becomes one line and exit code 2."""
    try:
        app(translated(sys.argv[1:], lambda line: typer.echo(f"twostroke: {line}", err=True)))
    except TwostrokeError as error:
        fail(error)


def _version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        typer.echo(f"twostroke {__version__}")
        raise typer.Exit


def _root() -> typer.Typer:
    app = typer.Typer(
        name="twostroke",
        help="A disaggregated serving cluster for large language models.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.callback()(_options)
    return app


def _with_commands(names: Iterable[str]) -> typer.Typer:
    app = _root()
    for name in names:
        module = importlib.import_module(f".{COMMANDS[name].module}", __package__)
        if hasattr(module, "app"):  # it has commands of its own
            app.add_typer(module.app, name=name)
        else:
            app.command(name)(getattr(module, name))
    return app


def _listed() -> None:
    """A command in a list of all, which no arguments name."""


def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Say it.")] = False,
) -> None:
    pass


if __name__ == "__main__":
    with uncollected():
        app = program(sys.argv[1:])
    run(app)
