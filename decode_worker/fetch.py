"""One fetch of cached blocks from another worker: carries out the machine's actions. Knows no text, no router.

The blocks of a chain that this worker lacks, e.g. those of a request that goes on here after another decode worker gave
it back: fetched, they need not be computed again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Protocol

from ..core.request import CacheScope, SequenceKey
from ..engine.link.messages import WriteKv
from ..kv.handover.carrier import Carrier, Check, CheckLine, StreamHost
from ..kv.handover.damage import verify_frame
from ..kv.handover.fetching import MAX_WRITING, BlockFetch, FetchedFrame
from ..kv.handover.frames import Frame, WireError, decode_envelope
from ..kv.handover.machine import Action, AskBlocks, Close, Fetched, Write
from ..kv.messages import scope_to_wire
from ..kv.spec import HASH_BLOCK_TOKENS
from ..kv.windows import lacks_windows
from ..protos import handover_pb2
from .pull import KvPullTools

log = logging.getLogger(__name__)


class FetchHost(StreamHost, Protocol):
    """Host of a fetch: the one envelope that is sent is the request."""

    def hold(self, is_held: bool) -> None:
        """Hand over no further envelope while held, as far as the transport can."""
        ...


class Lacking(Protocol):
    """A sequence that lacks blocks."""

    @property
    def key(self) -> SequenceKey:
        """Its name in the cluster; empty: nobody waits for this fetch."""
        ...

    @property
    def engine_key(self) -> SequenceKey:
        """Its name in the engine."""
        ...

    @property
    def scope(self) -> CacheScope:
        """Cache scope of its blocks."""
        ...


class KvFetch:
    """One fetch, from the request to its last stored block. The host reads the stream; all calls come on its loop."""

    def __init__(
        self,
        fetch: BlockFetch,
        host: FetchHost,
        order: Lacking,
        tools: KvPullTools,
        over: Callable[[Fetched], None],
    ) -> None:
        """`order`: of the sequence that the blocks are for. `over` is called once, unless the fetch is cancelled."""
        self.fetch = fetch
        self._host = host
        self._order = order
        self._tools = tools
        self._over = over
        self._frame: Frame | None = None  # the one that the machine is handling
        self._carrier = Carrier(fetch, host, self._act, self._pace)
        self._envelopes: CheckLine[bytes | None] = CheckLine(host, self._check_of, self._take)
        host.listen(self._envelopes.put)
        host.after(0.0, self._begin)  # later, because the owner does not have its reference to this object yet

    def written(self, token_start: int, token_count: int) -> None:
        """The engine stored a frame."""
        self._carrier.do(self.fetch.written(token_start, token_count))

    def cancel(self) -> None:
        """End the fetch; its result is no longer wanted."""
        self._carrier.do(self.fetch.cancel())

    # ------------------------------------------------------------------ inside

    def _begin(self) -> None:
        self._carrier.do(self.fetch.begin(self._host.now_s()))

    def _check_of(self, envelope: bytes | None) -> Check | None:
        """The check of a frame's digests; None: there is nothing to check, or nothing more is wanted."""
        if envelope is None or self.fetch.end is not None:
            return None
        try:
            frame = _frame_of(envelope)
        except WireError:
            return None  # `_take` comes to it in its turn
        windows_from = self.fetch.wanted.end_token  # the machine decides what is of use without windowed layers
        holds = partial(verify_frame, frame, self._tools.digest_key, self._tools.kv_spec, windows_from)
        return Check(holds, len(envelope), partial(self._judge, frame, len(envelope)))

    def _take(self, envelope: bytes | None) -> None:
        """Handle the stream's end, or what is no frame, after all earlier ones."""
        if envelope is None:
            self._carrier.do(self.fetch.closed())
            return
        try:
            _frame_of(envelope)
        except WireError as error:
            self._carrier.do(self.fetch.garbled(str(error)))

    def _judge(self, frame: Frame, num_bytes: int, is_intact: bool) -> None:
        header = frame.header
        if not is_intact:
            self._tools.counters["kv_corrupted_frames"] += 1
        arrived = FetchedFrame(
            sequence=header.sequence,
            token_start=header.token_start,
            token_count=header.token_count,
            identities=tuple(header.identities),
            numerics_class=header.numerics_class,
            is_last=header.last,
            is_intact=is_intact,
            num_bytes=num_bytes,
            lacks_windows=lacks_windows(frame.sections, self.fetch.wanted.windowed),
        )
        self._frame = frame
        self._carrier.do(self.fetch.on_frame(arrived, self._host.now_s()))
        self._frame = None

    def _pace(self) -> None:
        self._host.hold(self.fetch.num_writing >= MAX_WRITING and self.fetch.end is None)

    def _act(self, action: Action) -> None:
        match action:
            case AskBlocks(identities, first_token):
                request = handover_pb2.FetchRequest(
                    identities=identities,
                    first_token=first_token,
                    **scope_to_wire(self._order.scope),
                    request_id=self._order.key.request_id,
                    choice=self._order.key.choice,
                    only_windows=self.fetch.wanted.windowed is not None,
                )
                self._host.send(request.SerializeToString())
            case Write(_, token_start, token_count):
                assert self._frame is not None, "a Write answers a frame"
                self._tools.dispatcher.send(
                    WriteKv(self._order.engine_key, token_start, token_count, self._frame.sections)
                )
            case Fetched(end, stored_upto, detail):
                counters = self._tools.counters
                counters[f"fetch_{end}"] += 1
                counters["fetched_blocks"] += (stored_upto - self.fetch.wanted.first_token) // HASH_BLOCK_TOKENS
                counters["fetched_bytes"] += self.fetch.num_bytes
                log.info("%s: fetch %s, stored up to %d %s", self._order.engine_key, end, stored_upto, detail)
                self._over(action)
            case Close(now):
                self._host.close(now=now)
            case _:
                raise AssertionError(action)


def _frame_of(envelope: bytes) -> Frame:
    received = decode_envelope(envelope)
    if not isinstance(received, Frame):
        raise WireError("a message where only frames may come")
    return received
