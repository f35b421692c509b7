"""Process of one rank of a worker, except rank 0: `python -m twostroke.worker.rank_main SOCKET REGION PARENT`.

SOCKET and REGION are inherited file descriptors: the link to rank 0 and the group's memory. The `RankOrder` comes by
standard input. The process ends with rank 0, however rank 0 ends: its socket closes, the system sends SIGKILL when its
process dies, and the group notices when its threads stand still.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import socket
import sys
from pathlib import Path

from ..core.errors import TwostrokeError
from ..core.foreground import leave
from ..core.process_settings import keep_present_objects
from ..engine.link.rank_link import LinkEnded, RankReceiver
from ..engine.loop import EngineStore
from ..kernels.cpu.build import built_library
from ..kv.keys import digest_key
from ..kv.slices import RankSlices
from ..kv.store.host_store import HostStore
from ..model.loader import RunnerOptions, load_runner
from ..model.parallel.shared_group import SharedMemoryGroup
from ..model.resolved import resolve
from ..model.runner import Runner
from .rank_order import RankOrder, send_answer
from .rank_work import follow

_PR_SET_PDEATHSIG = 1
_log = logging.getLogger(__name__)


def main() -> int:
    """Load this rank's part, then follow rank 0 to its end; returns the exit code."""
    sock, region, parent_pid = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3])
    _end_with(parent_pid)
    order = RankOrder.model_validate_json(sys.stdin.buffer.read())
    name = f"rank {order.rank} of {order.settings.worker_id}"
    logging.basicConfig(format=f"{name}: %(levelname)s %(message)s", level=logging.WARNING)
    if order.cores:
        os.sched_setaffinity(0, order.cores)
    group = SharedMemoryGroup(region, order.rank, order.size, order.slot_bytes)
    os.close(region)
    try:
        runner, store, slices = load_rank(order, group)
    except BaseException as error:
        if not isinstance(error, TwostrokeError):
            _log.exception("the model could not be loaded")
        send_answer(sock, error)
        return 1
    keep_present_objects()
    send_answer(sock, None)
    receiver = RankReceiver(sock)
    try:
        follow(receiver, runner, store, group, slices)
    except LinkEnded:
        return 0
    except Exception as error:
        _log.error("this rank ends: %s", error)
    finally:
        receiver.close()
        group.close()
    return 1


def load_rank(order: RankOrder, group: SharedMemoryGroup) -> tuple[Runner, EngineStore, RankSlices]:
    """Load a rank's weights and make its store; also returns the slices of its worker.

    Raises:
        CheckpointError, ConfigError, DoesNotFit: as `build_engine` of build.py.
    """
    settings = order.settings
    model = resolve(Path(settings.model_directory), settings.model, settings.cache.codec, "cpu", built_library)
    runner = load_runner(model, rank_options(order), group)
    host = None
    if order.num_swap_blocks:
        host = HostStore(runner.store, runner.store.on_host(order.num_swap_blocks))
    return runner, EngineStore(runner.store, host), RankSlices(model.kv_spec, order.size)


def rank_options(order: RankOrder) -> RunnerOptions:
    """Options of a rank's runner."""
    settings = order.settings
    return RunnerOptions(
        num_blocks=order.num_blocks,
        block_tokens=settings.cache.block_size,
        num_threads=settings.num_threads,
        digest_key=digest_key(settings.cluster_key),
        samples=False,
    )


def _end_with(parent_pid: int) -> None:
    """Let the system end this process with its parent, which alone handles signals to the process group."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # the parent died before
        leave(1)


if __name__ == "__main__":
    leave(main())
