"""The commands that a serving cluster takes on this machine (drain, restart, down), and its folder."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from typing import Any

from ..cluster.deployment.keeper import may_live
from ..cluster.launch.member_log import MemberLog
from ..cluster.operations.control import Control
from ..cluster.operations.run_folder import LOG_NAME, RunFolder, State
from ..cluster.supervisor import Supervisor
from ..core.errors import ConfigError
from ..core.foreground import Stop

LOG_CHECK_S = 5.0

log = logging.getLogger(__name__)


class Doors:
    """From `open` to `close`, one per supervisor."""

    def __init__(self, supervisor: Supervisor, stop: Stop, held: RunFolder | None = None) -> None:
        """`held`: the folder of a detached cluster, whose lock this process has."""
        self._supervisor, self._is_required = supervisor, held is not None
        self._folder = held or RunFolder(supervisor.config.router.grpc_port)
        self._control = Control(supervisor.changes, self._workers, lambda: stop.hear(signal.SIGTERM))
        self._is_open = False
        self._bounding: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Take commands.

        Raises:
            ConfigError: members of a deployment live there that no process supervises.
        """
        if not self._is_required:
            try:
                self._folder.hold()
            except ConfigError as error:
                log.warning("the commands drain, restart and down will not find this cluster: %s", error)
                return
            try:
                check_nobody_lives(self._folder)
            except ConfigError:
                self._folder.let_go()
                raise
        self._is_open = True
        supervisor, config = self._supervisor, self._supervisor.config
        model = supervisor.model_name
        self._folder.write(
            State(os.getpid(), supervisor.http_url, supervisor.grpc_address, model, config.cluster.drain_timeout_s)
        )
        await self._control.start(self._folder.socket)
        if self._is_required:
            self._bounding = asyncio.create_task(_bound(MemberLog(self._folder.path, LOG_NAME)))

    def ready(self) -> None:
        """The cluster serves."""
        self._control.is_ready = True

    async def close(self, *, keeps_folder: bool = False) -> None:
        """Take no more commands, and remove the folder, unless its members live on. Idempotent."""
        if not self._is_open:
            return
        self._is_open = False
        if self._bounding is not None:
            self._bounding.cancel()
        await self._control.close()
        if keeps_folder:
            self._folder.forget_process()
            self._folder.let_go()
        else:
            self._folder.release()

    def _workers(self) -> list[dict[str, Any]]:
        seen = self._supervisor.seen
        return [] if seen is None else list(seen.cluster["workers"])


def check_nobody_lives(folder: RunFolder) -> None:
    """Check that no members of a deployment live there.

    Raises:
        ConfigError: some do; with the remedies.
    """
    port = folder.path.name
    if may_live(folder.path):
        raise ConfigError(
            f"members of a cluster that nobody supervises live at port {port}: `twostroke up` with the settings that "
            f"it was started with supervises them, `twostroke down --grpc 127.0.0.1:{port}` ends them; or give another "
            "--grpc-port"
        )


async def _bound(own: MemberLog) -> None:
    """Keep our own log within its size."""
    while True:
        await asyncio.sleep(LOG_CHECK_S)
        await asyncio.to_thread(own.bound)
