"""A member's process that another supervisor started: it can be watched and ended, but its exit code is not ours."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress

from ..deployment.processes import ProcessIdentity, kill_group, lives


class AdoptedProcess:
    """Shaped like asyncio's `Process` as far as a launcher uses it. Made by `adopt`."""

    def __init__(self, identity: ProcessIdentity, descriptor: int) -> None:
        self._identity, self._descriptor = identity, descriptor
        self._ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(descriptor, self._note_end)

    @classmethod
    def adopt(cls, identity: ProcessIdentity) -> AdoptedProcess | None:
        """Watch a process from now on; None: it has ended."""
        try:
            descriptor = os.pidfd_open(identity.pid)
        except OSError:
            return None
        if lives(identity):
            return cls(identity, descriptor)
        os.close(descriptor)
        return None

    @property
    def pid(self) -> int:
        """Number of the process."""
        return self._identity.pid

    @property
    def has_ended(self) -> bool:
        """True if it has."""
        return self._ended.is_set()

    async def wait(self) -> None:
        """Return when the process has ended."""
        await self._ended.wait()

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to exactly this process."""
        if not self.has_ended:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._descriptor, number)

    def end(self) -> None:
        """Send SIGKILL to it and the processes that it started."""
        kill_group(self._identity)

    def forget(self) -> None:
        """Watch it no more."""
        if not self.has_ended:
            asyncio.get_running_loop().remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._ended.set()

    def _note_end(self) -> None:
        self.forget()
