"""The other ranks of a worker's model: starts their processes, watches them, and ends them all together.

    worker's process                            rank processes
    rank 0: face, engine, own part  ─ socket ─▶ rank 1: own part, own cores
            └──── shared memory of the group ────┘

The ranks are one unit: if one of them dies or stands still, the group's calls fail at all ranks, the others are killed,
and `on_lost` is called with the reason, so that the worker's process ends and is restarted. Nothing remains of a group
whose processes are gone: memory and sockets have no names.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from ..core.errors import ConfigError, InternalError, TwostrokeError
from ..engine.link.rank_link import RankSender
from ..model.parallel.shared_group import SharedMemoryGroup, shared_region
from .rank_order import RankOrder, read_answer

WATCH_S = 0.1  # between two looks at the processes and at the group
CLOSE_S = 2.0  # longest time for ranks to end by themselves
_log = logging.getLogger(__name__)


class Ranks:
    """Processes of ranks 1 … n-1, and rank 0's ends of the link and the group. Made by `start`; `close` it once."""

    def __init__(self, orders: Sequence[RankOrder], on_lost: Callable[[str], None]) -> None:
        """`orders`: of all ranks. `on_lost` is called once, in another thread, when a rank is lost while serving."""
        first = orders[0]
        region = shared_region(first.size, first.slot_bytes)
        pairs = [socket.socketpair() for _ in orders[1:]]
        self.sender = RankSender([here for here, _ in pairs])
        self.group = SharedMemoryGroup(region, 0, first.size, first.slot_bytes)
        self._sockets = [here for here, _ in pairs]
        self._on_lost = on_lost
        self._processes: list[subprocess.Popen[bytes]] = []
        self._lost = ""
        self._closes = threading.Event()
        started = threading.Event()
        self._failure: BaseException | None = None

        def run() -> None:
            try:
                for order, (_, there) in zip(orders[1:], pairs, strict=True):
                    self._processes.append(_spawned(order, there, region))
            except BaseException as error:
                self._failure = error
            finally:
                for _, there in pairs:
                    there.close()
                os.close(region)
                started.set()
            self._watch()

        # The system kills a rank when the thread that started it ends, so this thread lives as long as the ranks do.
        self._thread = threading.Thread(target=run, name="ranks", daemon=True)
        self._thread.start()
        started.wait()
        if self._failure is not None:
            self.close()
            raise self._failure

    @classmethod
    def start(cls, orders: Sequence[RankOrder], on_lost: Callable[[str], None]) -> Ranks:
        """Start the processes; they load their parts meanwhile.

        Raises:
            ConfigError: this system cannot share memory between ranks.
        """
        if sys.platform != "linux":
            raise ConfigError("tensor parallelism needs Linux: use --tensor-parallel-size 1")
        return cls(orders, on_lost)

    @property
    def pids(self) -> tuple[int, ...]:
        """Processes of ranks 1 … n-1."""
        return tuple(process.pid for process in self._processes)

    def wait_ready(self, timeout_s: float) -> None:
        """Wait until all ranks have loaded their parts.

        Raises:
            TwostrokeError: a rank could not load, ended, or was not ready in time; names the rank.
        """
        give_up_s = time.monotonic() + timeout_s
        for rank, sock in enumerate(self._sockets, 1):
            timeout, left_s = sock.gettimeout(), max(0.0, give_up_s - time.monotonic())
            sock.settimeout(left_s or 0.001)
            try:
                read_answer(sock)
            except TwostrokeError as error:
                raise type(error)(f"rank {rank}: {error}") from None
            except TimeoutError:
                raise InternalError(f"rank {rank} was not ready after {timeout_s:.0f} s") from None
            except (EOFError, OSError):
                raise InternalError(f"rank {rank} ended while loading: {self._end_of(rank)}") from None
            sock.settimeout(timeout)

    def close(self, *, is_idle: bool = True) -> None:
        """End all ranks and free everything. Idempotent.

        `is_idle`: rank 0 makes no call any more. Else its call ends with `RankLost`, and its end of the group stays.
        """
        self._closes.set()
        self.sender.close()
        give_up_s = time.monotonic() + CLOSE_S
        for process in self._processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.01, give_up_s - time.monotonic()))
        self._kill()
        if threading.current_thread() is not self._thread:
            self._thread.join(CLOSE_S)
        if is_idle:
            self.group.close()
        else:
            self.group.fail(0)

    # ------------------------------------------------------------------ inside

    def _watch(self) -> None:
        while not self._closes.wait(WATCH_S):
            reason = self._reason()
            if reason and not self._closes.is_set():
                self._kill()
                _log.error("this worker ends: %s", reason)
                self._on_lost(reason)
                break
        for process in self._processes:
            process.wait()

    def _reason(self) -> str:
        """Why the group is lost; empty while it lives."""
        for rank, process in enumerate(self._processes, 1):
            if process.poll() is not None:
                self.group.fail(rank)
                return f"rank {rank} has ended: {self._end_of(rank)}"
        lost = self.group.lost_rank()
        return "" if lost is None else f"rank {lost} stands still, or was lost by another rank"

    def _end_of(self, rank: int) -> str:
        process = self._processes[rank - 1]
        with suppress(subprocess.TimeoutExpired):
            process.wait(1.0)
        code = process.returncode
        if code is None:
            return "it closed its socket"
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    def _kill(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()


def _spawned(order: RankOrder, sock: socket.socket, region: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-P", "-m", "twostroke.worker.rank_main"]
    process = subprocess.Popen(
        [*command, str(sock.fileno()), str(region), str(os.getpid())],
        stdin=subprocess.PIPE,
        pass_fds=(sock.fileno(), region),
        env={**os.environ, "OMP_NUM_THREADS": str(order.settings.num_threads)},
    )
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # it has ended: the watcher says so
        process.stdin.write(order.model_dump_json().encode())
        process.stdin.close()
    return process
