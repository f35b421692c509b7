"""A real redis-server on a free port, in memory alone."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from twostroke.core.ports import free_ports

WITHOUT = "redis-server is not installed (apt-get install redis-server)"
START_S = 20.0


class RedisServer:
    """The server's process, which tests kill and freeze."""

    def __init__(self, folder: Path, options: tuple[str, ...]) -> None:
        (self.port,) = free_ports("127.0.0.1", 1)
        command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
        self.process = subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL)
        end_s = time.monotonic() + START_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                if time.monotonic() > end_s:
                    raise
                time.sleep(0.02)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"


@contextmanager
def redis_server(*options: str) -> Iterator[RedisServer]:
    """Skips the test where there is no redis-server."""
    pytest.importorskip("redis")
    if shutil.which("redis-server") is None:
        pytest.skip(WITHOUT)
    with TemporaryDirectory() as folder:
        server = RedisServer(Path(folder), options)
        try:
            yield server
        finally:
            server.process.kill()
            server.process.wait()
