"""Console script. If only the SDK is installed, it names the missing extra."""

from __future__ import annotations

import os
import signal
import sys


def main() -> None:
    """Run the command line, or name the package extra that it needs. Ctrl-C during imports ends the process at once."""
    interrupted = signal.getsignal(signal.SIGINT)
    if interrupted is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # an exception could be swallowed by an import
    try:
        from ..core.process_settings import uncollected

        with uncollected():
            from .main import program, run

            app = program(sys.argv[1:])
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("twostroke"):
            raise
        sys.exit(
            f"twostroke: the command line needs {error.name}, and only the client SDK is installed; install the rest "
            "with `make setup`, or `pip install '.[all]'`, in twostroke's folder"
        )
    signal.signal(signal.SIGINT, interrupted)
    run(app)
