"""A folder of its own for `twostroke up` and what it leaves, and the commands in it as a user runs them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from typer.testing import CliRunner

from twostroke.cli.main import app
from twostroke.core.errors import TwostrokeError
from twostroke.core.ports import free_ports

KEY = "a key of this test"


class Said(NamedTuple):
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


class Home:
    """A short folder for everything that a cluster makes, and a configuration file."""

    def __init__(self, folder: Path, checkpoint: Path, **cluster: Any) -> None:
        """`cluster`: settings of that section."""
        self.folder = folder
        self.port, self.grpc_port = free_ports("127.0.0.1", 2)
        self.config = folder / "cluster.json"
        settings = {
            "model": {"path": str(checkpoint), "max_model_len": 256, "kernels": "torch"},
            "cache": {"tokens": 4096},
            "step": {"num_threads": 1},
            "router": {"port": self.port, "grpc_port": self.grpc_port},
            "cluster": {"launcher": "process", "prefill": 1, "decode": 1, "key": KEY} | cluster,
        }
        self.config.write_text(json.dumps(settings))

    @property
    def grpc(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    @property
    def run(self) -> Path:
        return self.folder / "twostroke"

    def say(self, *words: str) -> Said:
        """A command; `--grpc` is added where it belongs. What it starts has this folder in its environment."""
        where = () if words[0] == "up" else ("--grpc", self.grpc)
        mine = {"XDG_RUNTIME_DIR": str(self.folder), "TMPDIR": str(self.folder), "OMP_NUM_THREADS": "1"}
        result = CliRunner().invoke(app, [*words, *where], env=mine)
        if isinstance(result.exception, TwostrokeError):  # what `main` makes a line and exit code 2
            return Said(2, result.stdout, f"{result.stderr}twostroke: {result.exception}\n")
        return Said(result.exit_code, result.stdout, result.stderr)

    @property
    def state(self) -> dict[str, Any]:
        """What the supervisor wrote about itself."""
        return dict(json.loads((self.run / str(self.grpc_port) / "state.json").read_text()))

    def processes(self) -> list[psutil.Process]:
        """Every process that has this folder in its environment."""
        found = []
        for process in psutil.process_iter():
            try:
                if (
                    process.pid != os.getpid()
                    and process.environ().get("TMPDIR") == str(self.folder)
                    and process.status() != psutil.STATUS_ZOMBIE
                ):
                    found.append(process)
            except psutil.Error:
                continue
        return found
