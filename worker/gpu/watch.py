"""The GPU of one worker process: refused if it is unfit at the start, watched while the process serves."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from ...core.clock import Clock
from ...core.errors import DeviceCordoned, DeviceFault
from ..settings import WorkerSettings
from .monitor import GpuMonitor, GpuState
from .nvml import Library
from .source import monitor_of
from .verdict import Verdict
from .xid import Action

SETTLE_S = 3.0  # longest wait for a verdict that may still become harder
_log = logging.getLogger(__name__)


class GpuWatch:
    """A started monitor. Made by `start`; `close` it once."""

    def __init__(self, monitor: GpuMonitor) -> None:
        self._monitor = monitor

    @classmethod
    async def start(
        cls,
        settings: WorkerSettings,
        clock: Clock,
        on_change: Callable[[Verdict], None],
        library: Library | None = None,
    ) -> GpuWatch | None:
        """Watch the worker's GPU; None: it has none, or NVML does not know it.

        Raises:
            DeviceCordoned: the GPU is unfit: it is lost, needs a reset, or could not remap a memory row.
            ConfigError: the configured device is not there.
        """
        watch: GpuWatch | None = None

        def changed(verdict: Verdict) -> None:
            assert watch is not None
            watch.log(verdict)
            on_change(verdict)

        monitor = await asyncio.to_thread(monitor_of, settings, clock, changed, library)
        if monitor is None:
            return None
        watch = cls(monitor)
        verdict = await monitor.start()
        if verdict is None:
            return None
        if verdict.ends_process:
            await monitor.close()
            raise watch.fault()
        return watch

    def state(self) -> GpuState:
        """State of the device now."""
        return self._monitor.state()

    def fault(self) -> DeviceFault:
        """The verdict as an error."""
        state = self.state()
        device, why = state.identity.uuid, "; ".join(state.verdict.reasons)
        if state.verdict.action is Action.CORDON:
            return DeviceCordoned(f"{device} is cordoned: {why}")
        return DeviceFault(f"{device}: {state.verdict.action.word}: {why}")

    async def settled(self) -> None:
        """Wait until the verdict cannot become harder, for SETTLE_S at most."""
        try:
            async with asyncio.timeout(SETTLE_S):
                while not self.state().verdict.is_settled:
                    await asyncio.sleep(0.1)
        except TimeoutError:
            pass

    async def close(self) -> None:
        """Stop watching."""
        await self._monitor.close()

    def log(self, verdict: Verdict) -> None:
        """One line per verdict: a warning, or an information when all is well again."""
        level = logging.INFO if verdict.action is Action.NOTHING else logging.WARNING
        _log.log(level, "%s is %s: %s", self.state().identity.uuid, verdict.action.word, "; ".join(verdict.reasons))
