"""Client of the other routers of a cluster: asks all of them at once, with a deadline. Knows no request, no worker."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import grpc
import grpc.aio

from ...core.discovery.source import AddressSource
from ...core.errors import InvalidRequest, StreamMoved, Unavailable
from ...core.inside import InsideChannel
from ...core.tls.callers import Caller
from ...core.tls.identity import TlsIdentity
from ...kv.handover.transports.grpc import CHANNEL_OPTIONS
from ...kv.messages import error_from_wire
from ...protos import peers_pb2, peers_pb2_grpc
from ..journal.journal import Asked
from ..journal.stored import Stored
from ..journal.wire import asked_from_wire, piece_from_wire
from ..requests.pieces import OutputDelta

log = logging.getLogger(__name__)

ANSWER_S = 1.0  # a router that does not answer within this time is left out
READ_S = 5.0  # longest time to read what a router has of a request
MAX_ANSWER_BYTES = 32 << 20  # a stored conversation of the longest bodies, with escapes

Reply = TypeVar("Reply")
_FAILURES = (grpc.RpcError, grpc.aio.UsageError, grpc.aio.InternalError, TimeoutError)


class Peers:
    """The other routers, by the host:port of their internal ports. Without any, every answer is empty."""

    def __init__(
        self,
        addresses: Sequence[str],
        key: bytes,
        tls: TlsIdentity | None = None,
        sources: Sequence[AddressSource] = (),
    ) -> None:
        """`key`: kv.keys.proof_key, the same as theirs; `tls`: our certificates. Connects at the first question.

        `sources`: of further ones, which come and go, without ourselves. `start` begins to follow them.
        """
        self._fixed = tuple(addresses)
        self._sources = tuple(sources)
        self._key = key
        self._tls = tls
        self._channels: dict[str, InsideChannel] = {}
        self._searches: list[asyncio.Task[None]] = []

    def __len__(self) -> int:
        return len(self.addresses)

    @property
    def num_scraped_here(self) -> int:
        """Number of routers that `metrics` asks."""
        return len(self._fixed)

    @property
    def addresses(self) -> tuple[str, ...]:
        """host:port of all that are known now."""
        found = frozenset[str]().union(*(source.addresses for source in self._sources))
        return (*self._fixed, *sorted(found.difference(self._fixed)))

    def start(self) -> None:
        """Begin to look for routers; returns at once."""
        self._searches = [asyncio.create_task(self._follow(source)) for source in self._sources]

    async def _follow(self, source: AddressSource) -> None:
        """Close the connections to routers that are gone."""
        async with contextlib.aclosing(source.follow()) as changes:
            async for _ in changes:
                gone = [address for address in self._channels if address not in self.addresses]
                for address in gone:
                    await self._channels.pop(address).close()

    async def explain(self, tenant: str, request_id: str) -> dict[str, Any] | None:
        """The report about a tenant's request of the first router that knows it; None: none does."""
        asked = peers_pb2.PeerRequest(tenant=tenant, request_id=request_id)
        for reply in await self._ask_all(lambda stub: stub.Explain(asked, timeout=ANSWER_S)):
            if reply.json and (report := _json_object(reply.json)) is not None:
                return report
        return None

    async def abort(self, tenant: str, request_id: str) -> bool:
        """Cancel a tenant's running request wherever it is. False: no router has it."""
        asked = peers_pb2.PeerRequest(tenant=tenant, request_id=request_id)
        return any(reply.found for reply in await self._ask_all(lambda stub: stub.Abort(asked, timeout=ANSWER_S)))

    async def reports(self) -> list[dict[str, Any]]:
        """The reports of all routers that answer, in the order of their addresses."""
        question = peers_pb2.PeerQuestion()
        replies = await self._ask_all(lambda stub: stub.Report(question, timeout=ANSWER_S))
        return [report for reply in replies if (report := _json_object(reply.json)) is not None]

    async def metrics(self) -> list[tuple[str, str]]:
        """Name and metrics (OpenMetrics text) of the routers that answer, of those that were named.

        Routers that are found have addresses of their own, and whoever scrapes finds them as well.
        """
        question = peers_pb2.PeerQuestion()
        replies = await self._ask_all(lambda stub: stub.Metrics(question, timeout=ANSWER_S), self._fixed)
        return [(reply.router_id, reply.text) for reply in replies]

    async def find_key(self, tenant: str, key: str) -> peers_pb2.JournaledKey | None:
        """The request that a tenant started with this Idempotency-Key at another router; None: none."""
        asked = peers_pb2.PeerKey(tenant=tenant, key=key)
        replies = await self._ask_all(lambda stub: stub.FindKey(asked, timeout=ANSWER_S))
        return next((reply for reply in replies if reply.request_id), None)

    async def follow(self, tenant: str, request_id: str) -> Followed | None:
        """A tenant's resumable request at another router, and all its pieces as they come; None: no router has it."""
        begun = await self._begun(peers_pb2.PeerRequest(tenant=tenant, request_id=request_id))
        return None if begun is None else Followed(begun.asked, _followed(begun), begun.num_proven)

    async def so_far(self, tenant: str, request_id: str) -> Stored | None:
        """What another router has of a tenant's resumable request now; None: no router has it.

        Raises:
            Unavailable: its router was lost meanwhile.
        """
        begun = await self._begun(peers_pb2.PeerRequest(tenant=tenant, request_id=request_id, so_far=True))
        if begun is None:
            return None
        stored = Stored(begun.asked)
        try:
            async with asyncio.timeout(READ_S):
                async for piece in _followed(begun, stored):
                    stored.pieces.append(piece)
        except TimeoutError:
            raise Unavailable(f"the router at {begun.address} is slow; ask again", retry_after_s=1.0) from None
        return stored

    async def forget(self, tenant: str, request_id: str) -> bool:
        """Delete a tenant's resumable request wherever it is. False: no router has it."""
        asked = peers_pb2.PeerRequest(tenant=tenant, request_id=request_id)
        return any(reply.found for reply in await self._ask_all(lambda stub: stub.Forget(asked, timeout=ANSWER_S)))

    async def _begun(self, asked: peers_pb2.PeerRequest) -> _Begun | None:
        """A request as the first router that has it begins to tell it; None: no router has it."""
        begun = await asyncio.gather(*(self._begin(address, asked) for address in self.addresses))
        found = [one for one in begun if one is not None]
        for other in found[1:]:
            other.call.cancel()
        return found[0] if found else None

    async def _begin(self, address: str, asked: peers_pb2.PeerRequest) -> _Begun | None:
        """The request, and the call that goes on with its pieces; None: it is not there."""
        stub: Any = peers_pb2_grpc.PeersStub(self._channel(address))
        call = stub.Follow(asked)
        try:
            async with asyncio.timeout(ANSWER_S):
                item = await call.read()
            if item is not grpc.aio.EOF and item.HasField("request"):
                num_proven = item.num_proven if item.HasField("num_proven") else None
                return _Begun(asked_from_wire(item.request), call, address, num_proven)
        except (*_FAILURES, InvalidRequest) as error:
            log.debug("router at %s: no answer: %s", address, error)
        call.cancel()
        return None

    async def close(self) -> None:
        """Close all connections."""
        for search in self._searches:
            search.cancel()
        await asyncio.gather(*self._searches, return_exceptions=True)
        channels, self._channels = list(self._channels.values()), {}
        await asyncio.gather(*(channel.close() for channel in channels), return_exceptions=True)

    async def _ask_all(
        self, ask: Callable[[Any], Awaitable[Reply]], addresses: Sequence[str] | None = None
    ) -> list[Reply]:
        asked = self.addresses if addresses is None else addresses
        replies = await asyncio.gather(*(self._ask(address, ask) for address in asked))
        return [reply for reply in replies if reply is not None]

    async def _ask(self, address: str, ask: Callable[[Any], Awaitable[Reply]]) -> Reply | None:
        stub: Any = peers_pb2_grpc.PeersStub(self._channel(address))
        try:
            async with asyncio.timeout(ANSWER_S + 0.5):  # also for the proof of its answer
                return await ask(stub)
        except _FAILURES as error:
            log.debug("router at %s: no answer: %s", address, error)
            return None

    def _channel(self, address: str) -> Any:
        channel = self._channels.get(address)
        if channel is None:
            options = [*CHANNEL_OPTIONS, ("grpc.max_receive_message_length", MAX_ANSWER_BYTES)]
            channel = InsideChannel(address, self._key, options, self._tls, Caller.ROUTER)
            self._channels[address] = channel
        return channel


class Followed(NamedTuple):
    """A request at another router."""

    asked: Asked
    pieces: AsyncGenerator[OutputDelta, None]
    num_proven: int | None  # of an adopted one: pieces that are the first router's


class _Begun(NamedTuple):
    asked: Asked
    call: Any  # goes on with its pieces
    address: str
    num_proven: int | None


async def _followed(begun: _Begun, stored: Stored | None = None) -> AsyncGenerator[OutputDelta, None]:
    """The pieces of a followed request. `stored`: gets its end; then an error of its own is not raised.

    Raises:
        TwostrokeError: the request failed.
        StreamMoved: its router was lost.
    """
    try:
        while (item := await begun.call.read()) is not grpc.aio.EOF:
            if stored is not None and item.WhichOneof("body") in ("error", "over"):
                stored.is_over = True
                stored.error = error_from_wire(item.error) if item.HasField("error") else None
                return
            if item.HasField("error"):
                raise error_from_wire(item.error)
            yield piece_from_wire(item.piece)
    except _FAILURES as error:
        raise StreamMoved(f"the router of this stream at {begun.address} was lost; resume it") from error
    finally:
        begun.call.cancel()


def _json_object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
