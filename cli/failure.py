"""How a command fails: one line that says why, and exit code 2."""

from __future__ import annotations

from typing import NoReturn

import typer

from ..core.errors import TwostrokeError
from ..core.foreground import leave


def fail(error: TwostrokeError) -> NoReturn:
    """Say it and end, without waiting for threads that are still at what failed."""
    typer.echo(f"twostroke: {error}", err=True)
    leave(2)
