"""Finds the supervisor of a cluster on this machine, for the commands that ask it."""

from __future__ import annotations

from ..cluster.operations.run_folder import RunFolder
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
