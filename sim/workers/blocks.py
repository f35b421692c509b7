"""Cached blocks of a simulated worker: served to others, kept for others, offered to buddies.

The machines are production's (worker/blocks/, decode_worker/journaling.py); streams and faults are ours.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from ...core.errors import InvalidRequest
from ...core.request import SequenceKey
from ...decode_worker.fetch import FetchHost, KvFetch
from ...decode_worker.journal import Journal
from ...decode_worker.journaling import Journaling
from ...decode_worker.pull import KvPullTools
from ...engine.link.messages import BlocksFetched
from ...prefill_worker.returns import Lacked
from ...protos import handover_pb2
from ...worker.blocks.copies import Copies, CopyTools, KeepTask
from ...worker.blocks.departure import Departure
from ...worker.blocks.fetch import FetchAnswer
from ...worker.blocks.returns import ReturnOver, Returns, ReturnTask
from ..invariants import Violation
from ..network import End
from .buddies import SimBuddies
from .facts import address_of
from .handovers import SimFetchHost

if TYPE_CHECKING:
    from .node import WorkerNode

BEAT_S = 0.1  # between two reports of an engine's load to its face


class Blocks:
    """All that one life of a worker does with blocks beside its own requests."""

    def __init__(self, node: WorkerNode, pull: KvPullTools) -> None:
        self._node = node
        self.departure = Departure()
        self.copies = Copies(CopyTools(node.facts, pull, self._connect), lambda: node.service.is_draining)
        self._returns = Returns(CopyTools(node.facts, pull, lambda key, address, _: node.connect_source(key, address)))
        self._returning: dict[SequenceKey, ReturnTask] = {}  # by the name of the job in the engine
        self._left: set[SequenceKey] = set()  # of these jobs those whose hand-over is over
        self.journaling: Journaling | None = None
        self._copying: dict[SequenceKey, KeepTask] = {}  # by the copy's name in the engine
        limits = node.setting.journal
        if limits is not None:
            journal = Journal(limits, node.spec.bytes_per_token, node.worker.block_tokens)
            address = address_of(node.worker)
            buddies = SimBuddies(node, limits)
            self.journaling = Journaling(journal, buddies, node.world, Counter(), lambda: address)
            node.world.after(0.0, node.process, self._beat)

    @property
    def is_idle(self) -> bool:
        """True if no copy is made, no run has a journal and no offer is under way."""
        num_copies = self.copies.num_keeping + self._returns.num_fetching
        return not num_copies and (self.journaling is None or self.journaling.is_idle)

    # ------------------------------------------------------------------ Blocks.Fetch

    def accept_fetch(self, end: End, request: handover_pb2.FetchRequest) -> None:
        """Serve cached blocks, as worker/blocks/fetch.py does."""
        end.on_message = lambda _: None  # the request may come twice
        answer = FetchAnswer(request, self._node.facts, Counter())
        key = SequenceKey(request.request_id, request.choice)
        self.departure.fetch_began(key, self._node.world.now_s())
        self._serve_part(end, answer, key)

    def _serve_part(self, end: End, answer: FetchAnswer, key: SequenceKey) -> None:
        part = answer.next_part()
        if part is None or not end.is_open:
            end.finish()
            self.departure.fetch_ended(key, self._node.world.now_s(), is_whole=part is None)
            return

        def took(found: BlocksFetched) -> None:
            frame = answer.frame(found)
            if frame is not None:
                end.send(frame)
            self._serve_part(end, answer, key)

        self._node.dispatcher.ask_blocks(part, answer.root, took)

    # ------------------------------------------------------------------ returns

    def begin_return(self, lacked: Lacked, over: ReturnOver) -> ReturnTask | None:
        """Fetch what a job lacks, as production does."""
        task = self._returns.begin(lacked, over)
        if task is not None:
            self._returning[lacked.submit.key] = task
        return task

    def left(self, job: SequenceKey) -> None:
        """The hand-over of a job is over. Check R7 from now on: so is what it fetches."""
        task = self._returning.get(job)
        if task is not None and not task.is_over:
            self._left.add(job)
            self._node.must_end(task.copied.engine_key)

    # ------------------------------------------------------------------ Blocks.Keep

    def accept_keep(self, end: End, request: handover_pb2.KeepRequest) -> None:
        """Keep a copy, as worker/blocks/keep.py does. Sometimes the answer is nonsense."""
        end.on_message = lambda _: None  # the request may come twice

        def replied(reply: handover_pb2.KeepReply) -> None:
            end.send((self._said(reply),))
            end.finish()

        try:
            task = self.copies.begin(request, replied)
        except InvalidRequest as error:
            raise Violation("K7", f"{self._node.process} is offered what cannot be kept: {error}") from error
        if task is not None:
            self._copying[task.copied.engine_key] = task
            end.on_end = lambda: self._caller_left(task)

    def _said(self, reply: handover_pb2.KeepReply) -> bytes:
        world = self._node.world
        if not world.chance(self._node.setting.nonsense):
            return reply.SerializeToString()
        if world.chance(0.5):
            return world.random.randbytes(world.random.randrange(1, 12))
        return handover_pb2.KeepReply(
            kept_tokens=world.random.randrange(1 << world.random.randrange(33))
        ).SerializeToString()

    def _caller_left(self, task: KeepTask) -> None:
        task.cancel()
        self._node.must_end(task.copied.engine_key)

    def _connect(self, key: SequenceKey, address: str, timeout_s: float) -> FetchHost:
        """A copy's stream; when its fetch is over the copy has nothing to wait for."""
        host = self._node.connect_source(key, address)
        host.fetched = lambda: self._node.must_end(key)
        return host

    def _beat(self) -> None:
        """The face hears of the engine's load, which is soon out of date."""
        node = self._node
        node.dispatcher.last_load = node.engine.load()
        node.world.after(BEAT_S, node.process, self._beat)

    # ------------------------------------------------------------------ checks

    def check(self) -> None:
        """Check R7: every fetch gives up a silent source in time."""
        for run in self._node.service.runs:
            if run._fetch is not None:
                _host_of(run._fetch).check_deadline(run._fetch.fetch.next_deadline_s)
        for key, task in list(self._copying.items()):
            if task.fetch is not None:
                _host_of(task.fetch).check_deadline(task.fetch.fetch.next_deadline_s)
            if task.is_over:
                del self._copying[key]
        for key, returning in list(self._returning.items()):
            if returning.fetch is not None:
                _host_of(returning.fetch).check_deadline(returning.fetch.fetch.next_deadline_s)
            if returning.is_over:
                del self._returning[key]
                if key in self._left:
                    self._left.remove(key)
                    self._node.must_end(key)  # it must not begin now

    def check_drained(self) -> None:
        """Check K1 at the end: no copy, no offer and no run of the journal is left."""
        if not self.is_idle:
            num_copies = self.copies.num_keeping, self._returns.num_fetching
            raise Violation("K1", f"{self._node.process}: {num_copies} copies and returns, or offers, are left")


def _host_of(fetch: KvFetch) -> SimFetchHost:
    host = fetch._host
    assert isinstance(host, SimFetchHost)
    return host
