"""The console script: says what to install where only the SDK is there."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line, or name the extra that it needs."""
    try:
        from .main import main as run
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("twostroke"):
            raise
        sys.exit(f"twostroke: the command line needs {error.name}; pip install 'twostroke[all]'")
    run()
