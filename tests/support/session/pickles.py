"""No process of the tests unpickles anything: an audit hook in each, and one list of what they saw."""

import os
import runpy
import tempfile
from pathlib import Path

_FOLDER = str(Path(__file__).with_name("no_pickle"))
_LOG = "UNPICKLED_LOG"


class Watch:
    """The hook in this process and in all its children. The first process of a test run keeps the list."""

    def __init__(self) -> None:
        self.is_first = _LOG not in os.environ  # in others Python's start has installed it
        if not self.is_first:
            return
        handle, path = tempfile.mkstemp(prefix="unpickled-", suffix=".txt")
        os.close(handle)
        os.environ[_LOG] = path
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (_FOLDER, os.environ.get("PYTHONPATH"))))
        runpy.run_path(f"{_FOLDER}/sitecustomize.py")

    def seen(self) -> list[str]:
        """A line for each time that a process of this run unpickled something; empty in all but the first."""
        return Path(os.environ[_LOG]).read_text(encoding="utf-8").splitlines() if self.is_first else []

    def close(self) -> None:
        """Remove the list."""
        if self.is_first:
            Path(os.environ[_LOG]).unlink(missing_ok=True)
