"""Folder of one running cluster: who runs it, where its commands are taken, what it logged. For its owner alone.

A cluster whose members outlive their supervisor has its record there, too (../deployment/keeper.py).

`RUN/PORT/`, by the port of the router's gRPC API, with RUN = $XDG_RUNTIME_DIR/twostroke, or twostroke-run-UID in the
system's folder for temporary files. The lock in it ends with the process that holds it, however that ends.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import stat
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import IO, NamedTuple

from ...core.errors import ConfigError

_LOCK, _STATE, _SOCKET = "in-use", "state.json", "control.sock"
RECORD_NAME = "deployment.json"  # what its members are, while they may outlive the process (deployment/)
LOG_NAME = "serve"  # of the detached process: serve.log and serve.log.1
MAX_SOCKET_PATH = 100  # bytes; the system's limit is 107


class State(NamedTuple):
    """What a running cluster wrote about itself. No secret is in it."""

    pid: int
    http_url: str
    grpc_address: str
    model: str
    drain_timeout_s: float


class RunFolder:
    """The folder of the cluster at one port, whether it runs or not."""

    def __init__(self, grpc_port: int) -> None:
        self.path = _base() / str(grpc_port)
        self._lock: IO[str] | None = None

    @property
    def socket(self) -> Path:
        """The socket that takes commands."""
        return self.path / _SOCKET

    def make(self) -> None:
        """Create the folder, for its owner alone.

        Raises:
            ConfigError: somebody else owns a part of the path, or it cannot be created.
        """
        if len(os.fsencode(self.socket)) > MAX_SOCKET_PATH:
            raise ConfigError(f"{self.socket} is too long for a socket; set XDG_RUNTIME_DIR to a shorter folder")
        for folder in (self.path.parent, self.path):
            try:
                folder.mkdir(mode=0o700, exist_ok=True)
                facts = folder.lstat()
            except OSError as error:
                raise ConfigError(f"{folder} cannot be made: {error.strerror}; set XDG_RUNTIME_DIR") from None
            is_ours = stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.getuid() and not facts.st_mode & 0o077
            if not is_ours:
                raise ConfigError(f"{folder} must be a folder of yours that nobody else can enter; remove it")

    def hold(self) -> None:
        """Become the one process that runs the cluster here, until `release` or this process ends.

        Raises:
            ConfigError: another process is, or the folder cannot be made.
        """
        for _ in range(10):  # a folder that its last holder removes meanwhile is made again
            self.make()
            file = open(self.path / _LOCK, "a", opener=_for_owner)  # noqa: SIM115  # Path.open has no opener
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                file.close()
                raise ConfigError(self.occupied()) from None
            with suppress(OSError):
                if os.fstat(file.fileno()).st_ino == (self.path / _LOCK).stat().st_ino:
                    self._lock = file
                    return
            file.close()
        raise ConfigError(f"{self.path} cannot be held; other processes remove it again and again")

    @property
    def is_held(self) -> bool:
        """True if a process runs the cluster here."""
        try:
            with (self.path / _LOCK).open("r+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except OSError:
            return True
        return False

    def occupied(self) -> str:
        """Message for who wants to start a second cluster here."""
        state = self.state()
        where = f" (process {state.pid}, {state.http_url})" if state else ""
        return (
            f"a cluster runs at port {self.path.name} already{where}: `twostroke down --grpc 127.0.0.1:"
            f"{self.path.name}` ends it; or give another --grpc-port"
        )

    def write(self, state: State) -> None:
        """Store what others need to find the cluster."""
        with open(self.path / f"{_STATE}.new", "w", opener=_for_owner) as file:
            json.dump(state._asdict(), file)
        (self.path / f"{_STATE}.new").rename(self.path / _STATE)

    def state(self) -> State | None:
        """What the cluster stored; None: nothing, or something else."""
        try:
            found = State(**json.loads((self.path / _STATE).read_text()))
        except (OSError, ValueError, TypeError):
            return None
        return found if isinstance(found.pid, int) else None

    def forget_process(self) -> None:
        """Remove what an earlier process of the cluster wrote about itself."""
        for name in (_STATE, _SOCKET):
            (self.path / name).unlink(missing_ok=True)

    def release(self) -> None:
        """Remove the folder, and let go of it. Nobody of its cluster may live any more."""
        shutil.rmtree(self.path, ignore_errors=True)
        with suppress(OSError):
            self.path.parent.rmdir()  # the last one
        self.let_go()

    def let_go(self) -> None:
        """Let another process run the cluster here; the folder stays."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def _for_owner(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _base() -> Path:
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if runtime and Path(runtime).is_dir():
        return Path(runtime) / "twostroke"
    return Path(tempfile.gettempdir()) / f"twostroke-run-{os.getuid()}"
