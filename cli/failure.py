"""Failure of a command: one line with the reason, and exit code 2, or that of a fault of a GPU."""

from __future__ import annotations

from typing import NoReturn

import typer

from ..core.errors import DeviceFault, TwostrokeError
from ..core.foreground import leave


def fail(error: TwostrokeError) -> NoReturn:
    """Print the error and end the process, without waiting for threads that still run."""
    typer.echo(f"twostroke: {error}", err=True)
    leave(error.exit_code if isinstance(error, DeviceFault) else 2)
