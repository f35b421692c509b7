"""A worker process in virtual time: one engine, the production services of both roles, and cache events for routers.

Decode orders go through production's service, run, outbox and choice; hand-overs through production's machines.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from ...core.request import SequenceKey
from ...decode_worker.pull import KvPullTools
from ...engine.link import messages as link
from ...kv.cache.reach import reach_of
from ...kv.handover.carrier import StreamHost
from ...kv.handover.frames import WireError, decode_envelope, transfer_of
from ...kv.handover.machine import SendFrame
from ...kv.handover.transports.grpc import Channels
from ...prefill_worker.service import PrefillService
from ...prefill_worker.task import PrefillTask, PrefillTaskTools
from ...protos import common_pb2, handover_pb2, worker_pb2
from ...router.requests.attempts import CONFIRMS
from ...router.routing import facts as router_facts
from ...router.routing.buddies import KEEPS
from ...router.routing.facts import WorkerKey
from ...router.routing.returns import RETURNS
from ...worker.blocks.departure import hand_back_after_s
from ...worker.watch import FaceLoad, Watchers
from ..invariants import Violation, check_drained
from ..network import End, Network
from ..setting import Setting, WorkerSetting
from ..world import Process
from .blocks import Blocks
from .cells import CELL_BYTES, DIGEST_KEY, spec_of
from .dispatcher import SimDispatcher
from .engine import NUMERICS, Engine
from .faces import SessionFace, WatchFace
from .facts import PORT, ROUTER_MODEL, address_of, face_facts, ring_pool
from .handovers import Place, SimFetchHost, SimHost
from .paired import Paired
from .service import ORPHAN_SLACK_S, SimRunTools, SimService
from .store import TOKENIZER, Ledger

if TYPE_CHECKING:
    from ..router import RouterNode

WATCH_S = 0.9  # longest time until an idle group misses a rank
LOOK_S = 0.02  # how often a leaving worker looks whether it may go


class WorkerNode:
    """One life of one worker."""

    def __init__(
        self,
        network: Network,
        process: Process,
        worker: WorkerSetting,
        setting: Setting,
        ledger: Ledger,
    ) -> None:
        world = network.world
        self.world, self.network, self.process = world, network, process
        self.worker, self.setting = worker, setting
        self.spec = spec_of(setting.window, setting.heads)
        self.engine = Engine(world, process, setting, worker, ledger)
        self.dispatcher = SimDispatcher(self.engine)
        self.engine.tell = self._tell
        self.facts = face_facts(worker, setting)
        self.paired = Paired(self, setting.pairs, self.facts.transport)
        self.session_timing = cast(Any, None)  # SessionFace has its own timers
        self.rings = ring_pool(network.host, worker, self.spec)
        pull = KvPullTools(
            self.dispatcher,
            cast(Executor, None),
            DIGEST_KEY,
            self.spec,
            setting.timing,
            world,
            Counter(),
            rings=self.rings,
            pairs=self.paired.pairs,
        )
        self.blocks = Blocks(self, pull)
        tools = SimRunTools(self.facts, pull, cast(Channels, None), journal=self.blocks.journaling, node=self)
        self.service = SimService(tools, TOKENIZER, setting.grace_s)
        self.service.node, self.service.highest = self, {}
        jobs = PrefillTaskTools(
            self.dispatcher,
            pull.executor,
            DIGEST_KEY,
            NUMERICS,
            setting.timing,
            world,
            Counter(),
            open_memory=network.host.open,
            begin_return=self.blocks.begin_return,
            pair=self.paired.get,
        )
        self.prefill = PrefillService(self.facts, jobs, lambda: worker.role, worker.max_handovers)
        self.sessions: list[SessionFace] = []
        self.watches: list[WatchFace] = []
        self.jobs: dict[PrefillTask, SimHost] = {}
        self.find: Callable[[str], WorkerNode | None] = lambda _: None  # by worker id: its current life
        self._place = Place(world, process, setting.loses_nobody, worker.check_s, setting.stray)
        self._orphans: dict[SequenceKey, float] = {}  # sequences that nobody waits for: since when
        self._has_handed_back = False
        self.routers: Callable[[], Iterable[RouterNode]] = tuple  # those that live
        self.face = FaceLoad(worker.role)
        reach = reach_of(worker.block_tokens, self.spec.main.windowed)
        self.watchers = Watchers(
            self.dispatcher, process.life, lambda: self.face, Counter(), reach=reach, piece_identities=3
        )

    @property
    def is_idle(self) -> bool:
        """True when no sequence, hand-over or run is left."""
        is_busy = self.engine.num_live or self.jobs or self.service.num_running or self.dispatcher.num_owned
        return not is_busy and self.blocks.is_idle and self.paired.is_idle

    # ------------------------------------------------------------------ what routers open

    def accept(self, end: End, message: worker_pb2.SessionUp | worker_pb2.WatchRequest) -> None:
        """Take the first message of a router's stream, which decides between session and watch."""
        if isinstance(message, worker_pb2.WatchRequest):
            self.watches.append(WatchFace(self, end))
        elif message.HasField("hello"):
            session = SessionFace(self, end)
            self.sessions.append(session)
            session.hear(message)
        else:
            end.abort()  # the first message, the hello, was lost

    def info(self) -> common_pb2.WorkerInfo:
        """Worker info of a welcome; the router has the other facts from the announcement."""
        return common_pb2.WorkerInfo(worker_id=self.worker.worker_id, incarnation=self.process.life)

    def router_facts(self) -> router_facts.WorkerFacts:
        """Facts that the worker announces."""
        worker = self.worker
        return router_facts.WorkerFacts(
            worker_id=worker.worker_id,
            incarnation=self.process.life,
            role=worker.role,
            address=address_of(worker),
            model=replace(ROUTER_MODEL, numerics_class=worker.numerics),
            num_kv_blocks=worker.num_blocks,
            block_tokens=worker.block_tokens,
            max_num_seqs=worker.limits.max_num_seqs,
            max_batch_tokens=worker.limits.max_batch_tokens,
            capabilities=(CONFIRMS,) * worker.confirms
            + (KEEPS,) * (self.setting.journal is not None)
            + (RETURNS,) * self.setting.has_returns,
        )

    # ------------------------------------------------------------------ hand-overs

    def peer_at(self, address: str) -> WorkerNode:
        """The current life of the worker at an address."""
        peer = self.find(address.removesuffix(f":{PORT}"))
        assert peer is not None, address
        return peer

    def connect(self, address: str, name: str, *, is_calm: bool = False) -> tuple[End, End]:
        """Open a stream to the current life of the worker at an address: (our end, its end)."""
        return self.network.connect(self.process, self.peer_at(address).process, name, is_calm=is_calm)

    def connect_peer(self, key: SequenceKey, address: str) -> StreamHost:
        """Open a hand-over stream to a prefill worker."""
        peer, (near, far) = self.peer_at(address), self.connect(address, f"{key.request_id}>{address}")
        if peer.process.is_alive:
            far.on_message = lambda envelope: peer.accept_handover(far, envelope)
        host = SimHost(self._place, near, f"{key.request_id}#{key.choice} receiver")
        host.heard = self.flush
        return host

    def connect_source(self, key: SequenceKey, address: str) -> SimFetchHost:
        """Open a stream of cached blocks from another worker."""
        source, (near, far) = self.peer_at(address), self.connect(address, f"{key.request_id}<{address}")
        if source.process.is_alive:
            far.on_message = lambda request: source.blocks.accept_fetch(far, request)
        return SimFetchHost(self._place, near, f"{key.request_id}#{key.choice} fetch")

    def lose_rank(self, gone: Callable[[], None]) -> None:
        """The last rank dies or stands still: the next step fails, or the watch sees it; then `gone`."""
        ranks, life = self.engine.store.ranks, self.process.life
        if ranks is None or ranks.lost is not None:
            return
        ranks.lost = ranks.size - 1

        def over(_: str = "") -> None:
            if self.process.is_alive and self.process.life == life:
                self.world.note(self.process, "a rank is lost: all ranks end")
                gone()

        self.engine.group_lost = over
        self.world.after(WATCH_S, self.process, over)

    def leave(self, gone: Callable[[], None]) -> None:
        """Drain as a process that is told to stop: hand back what runs, let others fetch it, then call `gone`."""
        self.service.draining.is_on = self.face.draining = True
        key = WorkerKey(self.worker.worker_id, self.process.life)
        for router in self.routers():
            self.network.tell(self.process, router.process, partial(router.leaving, key))
        end_s = self.world.now_s() + self.setting.leave_s
        self.world.after(hand_back_after_s(self.setting.leave_s, 0, 0.0), self.process, self._hand_back)
        self._perhaps_gone(end_s, gone)

    def _hand_back(self) -> None:
        self.service.hand_back(lambda keys: self.blocks.departure.gave_back(keys, self.world.now_s()))
        self._has_handed_back = True

    def _perhaps_gone(self, end_s: float, gone: Callable[[], None]) -> None:
        now_s = self.world.now_s()
        may_go = (
            self._has_handed_back
            and self.blocks.departure.waits_until_s(now_s) is None
            and not self.service.num_running
        )
        if may_go or now_s >= end_s:
            gone()
        else:
            self.world.after(LOOK_S, self.process, lambda: self._perhaps_gone(end_s, gone))

    def accept_handover(self, end: End, envelope: bytes) -> None:
        """Take the first message of a hand-over stream."""
        try:
            message = decode_envelope(envelope)
        except WireError:
            end.abort()
            return
        if not isinstance(message, handover_pb2.HandoverUp):
            end.abort()
            return
        found: list[PrefillTask] = []
        name = f"{message.request_id}#{message.choice} sender"
        host = SimHost(self._place, end, name, closed=lambda: self._job_over(found))
        job = self.prefill.open(message, host)
        if job is not None:
            found.append(job)
            self.jobs[job] = host
            host.sends = lambda frame, envelope: self._check_frame(job, frame, envelope)

    def _job_over(self, found: list[PrefillTask]) -> None:
        """Leave the job after the current actions, as a stream ends when its handler returns."""
        for job in found:
            self.world.after(0.0, self.process, lambda job=job: self._leave(job))  # type: ignore[misc]

    def _leave(self, job: PrefillTask) -> None:
        if job in self.jobs:
            del self.jobs[job]
            self.prefill.leave(job)
            self.must_end(job.key)
            self.blocks.left(job.key)

    def must_end(self, key: SequenceKey) -> None:
        """Check R7 from now on: nobody waits for this sequence, so it ends at once."""
        self._orphans.setdefault(key, self.world.now_s())

    def _check_frame(self, job: PrefillTask, frame: SendFrame, envelope: bytes) -> memoryview | None:
        """Check K4: the planes of a frame are those computed for its tokens. Returns them if they are in a slot.

        Those that take a paired channel are damaged there, not with their header: what is returned then is a copy.
        """
        is_whole = not job.sender.leaves_out_windows(frame.token_start, frame.token_count)
        key, size = job.key, frame.token_count * (self.spec.bytes_per_token if is_whole else CELL_BYTES)
        planes = memoryview(envelope)[len(envelope) - size :]
        header = transfer_of(envelope) if job.sender.order.pair else None
        if header is not None:
            planes = memoryview(bytearray(self.paired.sources[job.sender.order.pair].sent.pop(header.transfer)))
        if frame.slot is not None:
            assert job.memory is not None, "a frame in a slot of no ring"
            planes = job.memory.slot(frame.slot)[:size]
        if not self.engine.store.leaves_as_computed(key, frame.token_start, frame.token_count, bytes(planes)):
            raise Violation("K4", f"{key}: a frame leaves that is not the KV of its tokens")
        return planes if frame.slot is not None or header is not None else None

    # ------------------------------------------------------------------ inside

    def _tell(self, events: Sequence[link.Event]) -> None:
        """Route the engine's events, then send the messages that they caused."""
        for event in events:
            self.dispatcher._route(event)
        self.flush()

    def flush(self) -> None:
        """Send everything that waits for routers."""
        for session in list(self.sessions):
            session.flush()
        for watch in list(self.watches):
            watch.flush()

    def check(self) -> None:
        """Check, after every event, the engine's invariants, R6 inside this worker, and the deadlines of R7."""
        self.engine.check()
        owner_of = self.service._ledger.router_of
        speaking = [(owner_of(run), run.order.key) for run in self.service.runs if run._verdict is None]
        if len(speaking) != len(set(speaking)):
            raise Violation("R6", f"{self.process}: two epochs of one request speak: {sorted(speaking)}")

        for job, host in self.jobs.items():
            host.check_deadline(job.sender.next_deadline_s)
        for run in self.service.runs:
            if run._pull is not None:
                cast(SimHost, run._pull._host).check_deadline(run._pull.receiver.next_deadline_s)
        self.blocks.check()
        self.paired.check()
        self._check_orphans()

    def _check_orphans(self) -> None:
        """Check that a sequence whose hand-over or copy ended is given up at once, not at its deadline."""
        if not self._orphans:
            return
        states, slack_s = self.engine.core.states(), ORPHAN_SLACK_S + self.process.frozen_s
        for key, since_s in list(self._orphans.items()):
            if key not in states and not self.engine.has_waiting_commands:
                del self._orphans[key]
            elif self.world.now_s() - since_s > slack_s:
                raise Violation("R7", f"{self.process}: {key} lives {slack_s} s after nobody waits for it")

    def check_drained(self) -> None:
        """Check K1 and K5 at the end, and that no job and no run is left."""
        check_drained(str(self.process), self.engine.core, self.engine.pool)
        findable = set(self.engine.prefix.snapshot())
        for watch in self.watches:
            if watch.is_up_to_date and watch.told != findable and not self.engine.has_waiting_commands:
                raise Violation("K5", f"{self.process}: told {len(watch.told)} blocks, {len(findable)} are findable")
        self.engine.check_findable()
        self.blocks.check_drained()
        self.paired.check_drained()
        if self.rings.used:
            raise Violation("K1", f"{self.process}: {len(self.rings.used)} rings are not given back")
        if self.jobs or self.service.num_running or self.dispatcher.num_owned:
            raise Violation(
                "K1", f"{self.process}: jobs or runs are left: {[host.name for host in self.jobs.values()]}"
            )
