"""The services of one engine, and what their hand-overs share. They end with the engine; the port stays."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, NamedTuple

from ...core.clock import Clock
from ...core.lease import Lease
from ...core.life import Life
from ...core.request import Role
from ...decode_worker.buddy_calls import BuddyCalls
from ...decode_worker.journal import Journal, JournalLimits
from ...decode_worker.journaling import Journaling
from ...decode_worker.paired_peers import PairShape
from ...decode_worker.pairs import Pairs
from ...decode_worker.pull import KvPullTools
from ...decode_worker.service import DecodeService
from ...decode_worker.tools import DecodeTaskTools
from ...engine.adapters import AdapterTable
from ...engine.facts import FaceFacts
from ...engine.link.client import EngineClient
from ...kv.cache.reach import reach_of
from ...kv.handover.frames import slot_bytes
from ...kv.handover.paired_library import Patience
from ...kv.handover.plane_channel import RingPool
from ...kv.handover.transports.communicator import join_by_torch
from ...kv.handover.transports.grpc import Channels
from ...kv.handover.transports.paired_end import PairedDestination, PairedSource, PairSettings
from ...kv.handover.transports.shared_memory import OwnRing, host_identity, open_ring, ring_bytes
from ...prefill_worker.pairs import PairService
from ...prefill_worker.service import PrefillService
from ...prefill_worker.task import PrefillTaskTools
from ...protos import common_pb2
from ..blocks.copies import Copies, CopyTools
from ..blocks.departing import Departing
from ..blocks.fetch import FetchService
from ..blocks.keep import KeepService
from ..blocks.returns import Returns
from ..built import BuiltEngine
from ..settings import WorkerSettings
from ..watch import FaceLoad, Watchers

ANY_ADDRESS = ("0.0.0.0", "::")  # then a paired channel uses the address of the machine's name
PAIR_JOIN_S = 10.0
PAIR_SHARE = 0.75  # of the silence that ends a hand-over: a transfer that hangs fails before the hand-over does


class FaceHost(NamedTuple):
    """What the faces have of their process, which outlives them."""

    settings: WorkerSettings
    clock: Clock
    timing: Lease  # of hand-overs
    counters: Counter[str]
    executor: Executor  # for digests
    channels: Channels  # to other workers
    table: AdapterTable
    ended: Callable[[Life], None]  # called for every run that is over
    host: str  # that is bound
    has_certificates: bool
    incarnation: int
    role: Callable[[], Role]
    is_draining: Callable[[], bool]
    address: Callable[[], str]  # of all services, once the port is bound
    gpus: Callable[[], tuple[common_pb2.GpuState, ...]]


class Faces:
    """All services over one engine."""

    def __init__(self, room: BuiltEngine, dispatcher: EngineClient, host: FaceHost) -> None:
        """`dispatcher`: the client of the engine's link."""
        self._host = host
        facts, settings = room.facts, host.settings
        common: dict[str, Any] = {
            "dispatcher": dispatcher,
            "executor": host.executor,
            "digest_key": facts.digest_key,
            "timing": host.timing,
            "clock": host.clock,
            "counters": host.counters,
            "ended": host.ended,
        }
        self.rings = _rings(facts, settings.cache.shared_bytes)
        """Shared memory for hand-overs to this worker; None: there is none."""
        self.pairs = self._pairs(facts)
        self.pairing = PairService(
            self._source,
            facts.transport,
            settings.cache.paired_bytes,
            host.counters,
            has_certificates=host.has_certificates,
        )
        self.pull = KvPullTools(kv_spec=facts.model.kv_spec, rings=self.rings, pairs=self.pairs, **common)
        limits = JournalLimits(settings.cache.journal_bytes_per_s)
        journal = Journal(limits, facts.model.kv_spec.bytes_per_token, facts.block_tokens)
        buddies = BuddyCalls(host.channels)
        self._journal = Journaling(journal, buddies, host.clock, host.counters, host.address)
        decoding = DecodeTaskTools(facts, self.pull, host.channels, host.table, self._journal)
        copying = CopyTools(facts, self.pull, decoding.connect_source)
        self.keep = KeepService(Copies(copying, host.is_draining))
        self.decode = DecodeService(decoding, room.tokenizer, settings.orphan_grace_s)
        job = PrefillTaskTools(
            numerics_class=facts.model.numerics_class,
            open_memory=open_ring,
            pair=self.pairing.get,
            adapters=host.table,
            begin_return=Returns(copying).begin,
            **common,
        )
        max_streams = settings.step.max_waiting + facts.max_num_seqs
        self.prefill = PrefillService(facts, job, host.role, max_streams)
        self.departing = Departing(host.clock)
        self.fetch = FetchService(facts, dispatcher, host.counters, self.departing)
        reach = reach_of(facts.block_tokens, facts.model.kv_spec.main.windowed)
        self.watchers = Watchers(dispatcher, host.incarnation, self._load, host.counters, reach=reach)

    async def drain(self, timeout_s: float) -> int:
        """Take no new work, let running work end for `timeout_s`, then hand back the rest; returns its number."""
        drains = self.decode.drain(timeout_s, self.departing.gave_back), self.prefill.drain(timeout_s)
        return sum(await asyncio.gather(*drains))

    def undrain(self) -> None:
        """Take new work again."""
        self.decode.undrain()
        self.prefill.undrain()

    def refuse_work(self) -> None:
        """Take no new work; what runs goes on."""
        self.decode.draining.is_on = self.prefill.draining.is_on = True

    async def close(self) -> None:
        """Give back what hand-overs share. Call it when the engine has ended."""
        await self.pairs.close()
        self.decode.close()
        self._journal.close()
        if self.rings is not None:
            self.rings.close()

    # ------------------------------------------------------------------ inside

    def _load(self) -> FaceLoad:
        host = self._host
        return FaceLoad(host.role(), host.is_draining(), self.pull.speed.bytes_per_s, host.gpus())

    def _pairs(self, facts: FaceFacts) -> Pairs:
        """Paired channels of this worker as decode; none are made unless its transport says so."""
        host = self._host
        shape = PairShape(facts.frame_slots, slot_bytes(facts.model.kv_spec, facts.frame_bytes))

        def make(number: int, shape: PairShape) -> PairedDestination:
            return PairedDestination(number, shape.slots, shape.slot_bytes, self._pair_settings)

        return Pairs(
            make,
            host.channels.pair,
            host.clock,
            host.counters,
            shape=shape,
            max_bytes=host.settings.cache.paired_bytes,
            worker_id=facts.worker_id,
        )

    def _source(self, slots: int, slot_bytes: int) -> PairedSource:
        return PairedSource(slots, slot_bytes, self._pair_settings)

    @property
    def _pair_settings(self) -> PairSettings:
        host = self._host.host
        patience = Patience(PAIR_JOIN_S, PAIR_SHARE * self._host.timing.silence_s)
        return PairSettings("" if host in ANY_ADDRESS else host, patience, join_by_torch)


def _rings(facts: FaceFacts, most_bytes: int) -> RingPool | None:
    """Shared memory for hand-overs from prefill workers of this host; None where the system has none for us."""
    if not host_identity() or not most_bytes:
        return None
    size = slot_bytes(facts.model.kv_spec, facts.frame_bytes)
    return RingPool(lambda: OwnRing(facts.frame_slots, size), ring_bytes(facts.frame_slots, size), most_bytes)
