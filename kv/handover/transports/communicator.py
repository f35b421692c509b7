"""Two-rank communicators of torch.distributed for planes: gloo between CPUs, NCCL between GPUs. Knows no hand-over.

`../paired_link.py` decides what is posted and when. Each communicator has a store of its own and no part in any process
group of the application: its failure ends nothing but this link.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed

from ..paired_library import SOURCE, Aborted, CommunicatorEvent, Completed, Failed, Join, Opened, Patience
from ..paired_link import Post

Backend = Literal["gloo", "nccl"]
MakeStore = Callable[[], Any]  # a torch.distributed.Store

_dist: Any = torch.distributed  # its stubs leave out stores and process groups
_POLL_S = 0.0005


Communicate = Callable[[Backend, MakeStore, str], Join]
"""`join_by_torch`, or a test's script."""


def join_by_torch(backend: Backend, store: MakeStore, host: str = "") -> Join:
    """Join by torch.distributed. `host`: address that gloo listens on; empty: that of the machine's name."""
    return lambda rank, patience, told: TwoRankCommunicator(backend, store, rank, patience, told, host=host)


def make_store(host: str, port: int, patience_s: float, *, is_master: bool) -> Any:
    """The meeting point of the two ranks. The master gives port 0 and reads the port from the store.

    Raises:
        RuntimeError: the master cannot be reached within `patience_s`.
    """
    return _dist.TCPStore(host, port, 2, is_master, timedelta(seconds=patience_s), wait_for_workers=False)


class TwoRankCommunicator:
    """One communicator. It joins, and waits for its operations in their order, in a thread of its own."""

    def __init__(
        self,
        backend: Backend,
        store: MakeStore,
        rank: int,
        patience: Patience,
        told: Callable[[CommunicatorEvent], None],
        *,
        host: str = "",
    ) -> None:
        """`store` is called in the thread. `told` gets the events, in the thread; after `Aborted` there are none."""
        self._backend = backend
        self._store = store
        self._rank = rank
        self._patience = patience
        self._told = told
        self._host = host
        self._group: Any = None
        self._works: queue.SimpleQueue[tuple[int, Any, torch.Tensor] | None] = queue.SimpleQueue()
        self._is_aborting = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"{backend} rank {rank}", daemon=True)
        self._thread.start()

    def post(self, post: Post, memory: torch.Tensor) -> None:
        """Post the send (source) or receive (destination) of `memory` uint8 [num_bytes]; call it after `Opened`.

        Does not wait. The library reaches the memory until `Completed` or `Aborted`.
        """
        assert self._group is not None, "not opened yet"
        assert memory.dtype == torch.uint8 and memory.numel() == post.num_bytes, memory.shape  # noqa: PT018
        try:
            act = self._group.send if self._rank == SOURCE else self._group.recv
            self._works.put((post.id, act([memory], 1 - self._rank, self._tag(post.id)), memory))
        except RuntimeError as error:
            self._told(Failed(_short(error)))

    def abort(self) -> None:
        """End the communicator; `Aborted` says when it cannot reach memory any more. Does not wait. Idempotent.

        gloo ends an operation only with its peer or its time, so this can take `Patience.operation_s`.
        """
        if not self._is_aborting.is_set():
            self._is_aborting.set()
            if self._group is not None and self._backend == "nccl":
                self._group.abort()
            self._works.put(None)

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread's end after `abort`; True if it has ended."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # ------------------------------------------------------------------ the thread

    def _run(self) -> None:
        try:
            self._group = self._joined()
            self._told(Opened())
            while (work := self._works.get()) is not None:
                self._wait(work[1])
                self._told(Completed(work[0]))
                del work
        except Exception as error:  # torch has no narrower type
            self._told(Failed(_short(error)))
            self._is_aborting.wait()
        self._drain()
        self._group = None
        self._told(Aborted())

    def _joined(self) -> Any:
        patience = timedelta(seconds=self._patience.join_s)
        if self._backend == "gloo":
            gloo = _dist.ProcessGroupGloo
            if not self._host:
                return gloo(self._store(), self._rank, 2, patience)
            options = gloo._Options()
            options._devices, options._timeout = [gloo.create_device(hostname=self._host)], patience
            return gloo(self._store(), self._rank, 2, options)
        # torch would end the whole process after an error of the peer: here an error ends this link.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        options = _dist.ProcessGroupNCCL.Options()
        options._timeout = patience
        options.config.blocking = 0
        return _dist.ProcessGroupNCCL(self._store(), self._rank, 2, options)

    def _tag(self, transfer: int) -> int:
        return transfer & 0x7FFFFFFF if self._backend == "gloo" else 0  # NCCL has no tags, only an order

    def _wait(self, work: Any) -> None:
        """Wait until an operation is over.

        Raises:
            RuntimeError: it failed, or took longer than the patience: gloo then ends the connection.
        """
        if self._backend == "gloo":
            work.wait(timedelta(seconds=self._patience.operation_s))
            return
        end_s = time.monotonic() + self._patience.operation_s
        while not work.is_completed():
            if self._is_aborting.is_set() or time.monotonic() > end_s:
                raise RuntimeError("the operation was aborted, or hangs")
            time.sleep(_POLL_S)

    def _drain(self) -> None:
        """Wait for the operations that are posted still: each ends by its peer, its time or the abort."""
        while True:
            try:
                work = self._works.get_nowait()
            except queue.Empty:
                return
            if work is not None:
                try:
                    self._wait(work[1])
                except RuntimeError:
                    continue


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
