"""Failure of a command: one line with the reason, and exit code 2."""

from __future__ import annotations

from typing import NoReturn

import typer

from ..core.errors import TwostrokeError
from ..core.foreground import leave


def fail(error: TwostrokeError) -> NoReturn:
    """Print the error and end the process, without waiting for threads that still run."""
    typer.echo(f"twostroke: {error}", err=True)
    leave(2)
