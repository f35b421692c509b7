"""`twostroke sim`: the simulators."""

from __future__ import annotations

import typer

app = typer.Typer(help="Run the production machines under a virtual clock.", no_args_is_help=True)
