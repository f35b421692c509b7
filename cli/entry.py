"""The console script: says what to install where only the SDK is there."""

from __future__ import annotations

import os
import signal
import sys


def main() -> None:
    """Run the command line, or name the extra that it needs. Ctrl-C while all that is imported ends at once."""
    interrupted = signal.getsignal(signal.SIGINT)
    if interrupted is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # an exception might be lost in somebody's import
    try:
        from .main import main as run
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("twostroke"):
            raise
        sys.exit(f"twostroke: the command line needs {error.name}; pip install 'twostroke[all]'")
    signal.signal(signal.SIGINT, interrupted)
    run()
