"""Main function of a worker process: settings of the process, signals, the parent's death, the drain at the end."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence

from ..core.discovery.source import AddressSource
from ..core.foreground import Stop, Stopped, first, leave, orphaned, unless
from ..core.process_settings import keep_present_objects, switch_often
from ..kernels.cpu.build import stop_building
from .machine import keep_freed_memory
from .process import WorkerProcess
from .settings import WorkerSettings

STOP_BUILDING_S = 1.0
ORPHANED = 2  # index of `orphaned` among the events that a serving worker waits for
log = logging.getLogger(__name__)


def prepare_process() -> None:
    """Set what concerns a whole process that hosts a worker and nothing else."""
    keep_freed_memory()
    switch_often()


def run_worker(settings: WorkerSettings, parent_pid: int | None = None, sources: Sequence[AddressSource] = ()) -> None:
    """Main function of a worker process: serve until SIGTERM, SIGINT or the parent's death, drain, return.

    `sources`: of routers beyond those of the settings.

    Raises:
        SystemExit: with 1, if the engine ended by its own fault: the process must be restarted.
        DeviceFault: the worker ended because of its GPU; DeviceCordoned: no process must be started on it again.
    """
    prepare_process()
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_serve(WorkerProcess(settings, sources=sources), settings.drain_timeout_s, parent_pid))


async def _serve(worker: WorkerProcess, grace_s: float, parent_pid: int | None) -> None:
    stop = Stop()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.hear, number)
    starter_pid = None if parent_pid is None else os.getppid()
    starting = asyncio.create_task(worker.start())
    await first(asyncio.wait([starting]), stop.asked.wait(), orphaned(starter_pid))
    if not starting.done():  # no request is running, and the thread that loads cannot be ended
        await asyncio.to_thread(stop_building, STOP_BUILDING_S)
        leave(stop.exit_code if stop.number else 0)
    await starting
    keep_present_objects()
    if parent_pid is None:  # started by hand, or by a system that keeps the output
        print(worker.readiness, file=sys.stderr, flush=True)
    if await first(worker.ended.wait(), stop.asked.wait(), orphaned(parent_pid)) == ORPHANED:
        log.warning("%s: its parent process is gone", worker.settings.worker_id)
    is_broken = worker.ended.is_set()
    try:
        await unless(stop.asked_again, worker.stop(0.0 if is_broken else grace_s))
    except Stopped:
        leave(stop.exit_code)
    if worker.fault is not None:
        raise worker.fault
    if is_broken:
        raise SystemExit(1)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    """uvloop's loop if uvloop is installed, else asyncio's."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop
    return uvloop.new_event_loop
