"""Dependencies that all runs of a worker share, and the streams that they open to other workers."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..core.request import SequenceKey
from ..engine.adapters import AdapterTable
from ..engine.facts import FaceFacts
from ..kv.handover.carrier import StreamHost
from ..kv.handover.driver import ClientDriver, FetchDriver
from ..kv.handover.transports.grpc import Channels
from .fetch import FetchHost
from .journaling import Journaling
from .pull import KvPullTools


@dataclass(frozen=True, slots=True)
class DecodeTaskTools:
    """Dependencies shared by all runs of a worker."""

    facts: FaceFacts
    pull: KvPullTools
    channels: Channels
    adapters: AdapterTable = field(default_factory=AdapterTable)  # of this worker
    journal: Journaling | None = None  # None: no stream has a buddy

    def connect(self, key: SequenceKey, address: str) -> StreamHost:
        """Open a hand-over stream to a prefill worker for a sequence."""
        del key
        pull = self.pull
        return ClientDriver(self.channels.transfer(address), pull.clock, pull.executor, pull.timing.silence_s)

    def connect_source(self, key: SequenceKey, address: str, timeout_s: float) -> FetchHost:
        """Open a stream of cached blocks from another worker for a sequence."""
        del key
        pull, stream = self.pull, self.channels.fetch_stream(address, timeout_s)
        return FetchDriver(stream, pull.clock, pull.executor, pull.timing.silence_s)
