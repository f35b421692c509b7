"""Finds the supervisor of a cluster on this machine, for the commands that ask it."""

from __future__ import annotations

from ..cluster.operations.run_folder import RECORD_NAME, RunFolder
from ..core.errors import ConfigError
from ..core.ports import is_own_address


def folder_of(grpc: str) -> RunFolder | None:
    """The folder of the cluster whose gRPC API is at host:port; None: that is another machine, or no port."""
    host, _, port = grpc.rpartition(":")
    if not port.isdecimal():
        return None
    return RunFolder(int(port)) if is_own_address(host.strip("[]")) else None


def running_folder_of(grpc: str) -> RunFolder | None:
    """The same, if a cluster of ours runs there."""
    folder = folder_of(grpc)
    return folder if folder is not None and folder.is_held else None


def without_supervisor(grpc: str) -> str | None:
    """What a user of a cluster at host:port must know whose supervisor has ended, not its members; None: nothing."""
    folder = folder_of(grpc)
    if folder is None or folder.is_held or not (folder.path / RECORD_NAME).exists():
        return None
    return (
        f"nobody supervises the cluster at port {folder.path.name}: what ends is not started again. `twostroke up` "
        f"with its settings supervises it again, `twostroke down --grpc {grpc}` ends it"
    )


def refuse_without_supervisor(grpc: str) -> None:
    """Refuse what only a supervisor can do.

    Raises:
        ConfigError: the cluster at host:port has none.
    """
    why = without_supervisor(grpc)
    if why is not None:
        raise ConfigError(why)
