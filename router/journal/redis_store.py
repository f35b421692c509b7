"""Journal store in Redis 7 or later: one stream per request, written behind in one batch per tick, encrypted.

    ts:j:PLACE   stream of sealed batches       ts:o:PLACE   sealed name of the owner, replaced by compare-and-set

A router writes only while it is the owner. So one that was frozen while another took its request over writes nothing
more, learns of it, and ends its own run. What Redis returns is untrusted: only values that the cluster's key sealed for
that place count. Every call has a deadline, and a failure is retried at a later tick. Until then the requests run on
and cannot be adopted.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from ...core.errors import ConfigError, Unavailable
from .journal import Asked, Entry
from .sealed import Sealer
from .stored import Stored, batch_of, read_back

log = logging.getLogger(__name__)

TICK_S = 0.05
CALL_S = 1.0  # longest wait for Redis
RETRY_S = 1.0  # after a failure
CANCELS = 5  # of the writer when the store closes
MAX_BATCH_BYTES = 4 << 20  # of one tick; the rest waits for the next
MAX_VALUES = 100_000  # of one stream

_WRITE = """
local owner = redis.call('GET', KEYS[2])
if owner and owner ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[2], ARGV[1], 'PX', ARGV[3])
redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[4], '*', 'v', ARGV[2])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return 1
"""
_CLAIM = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
return 1
"""

Reply = TypeVar("Reply")


class RedisStore:
    """One connection pool to one Redis."""

    def __init__(
        self, url: str, key: bytes, router: str, keep_s: Callable[[Asked], float], fenced: Callable[[Entry], None]
    ) -> None:
        """`key`: kv.keys.journal_key. `router`: name and life of this router. `keep_s`: how long a request is kept.

        `fenced`: another router has taken this request over.

        Raises:
            ConfigError: the client library is missing, or the address is none.
        """
        try:
            import redis.asyncio
        except ImportError:
            raise ConfigError("router.journal_url needs the Redis client: pip install 'twostroke[redis]'") from None
        try:
            self._redis: Any = redis.asyncio.from_url(url, socket_timeout=CALL_S, socket_connect_timeout=CALL_S)
        except ValueError as error:
            raise ConfigError(f"router.journal_url is no address of a Redis: {error}") from None
        self._sealer = Sealer(key)
        self._router = router.encode()
        self._keep_s = keep_s
        self._fenced = fenced
        self._owners: dict[Entry, bytes] = {}  # our sealed name in each request that we write
        self._written: dict[Entry, int] = {}  # items that are stored
        self._dirty: dict[Entry, None] = {}
        self._writer: asyncio.Task[None] | None = None
        self._news = asyncio.Event()
        self._writing = asyncio.Lock()
        self._is_closed = False
        self.is_up = True  # the last call was answered
        self.num_failures = 0

    @property
    def num_waiting(self) -> int:
        """Requests of which something is not written yet."""
        return len(self._dirty)

    def changed(self, entry: Entry) -> None:
        """Implements `JournalStore.changed`."""
        if self._is_closed:
            return
        self._dirty[entry] = None
        self._news.set()
        if self._writer is None:
            self._writer = asyncio.create_task(self._write_for_ever(), name="journal store")

    async def find(self, tenant: str, request_id: str) -> RedisClaim | None:
        """Implements `JournalStore.find`."""
        place = self._sealer.place(tenant, request_id)
        found = await self._call(self._redis.xrange(f"ts:j:{place}", count=MAX_VALUES))
        owner = await self._call(self._redis.get(f"ts:o:{place}"))
        if found is None:
            raise Unavailable("the journal's store does not answer; ask again", retry_after_s=1.0)
        if not isinstance(found, list) or self._sealer.open(owner, f"owner/{place}") is None:
            return None
        batches = []
        for value in found:
            raw = self._sealer.open(_value_of(value), place)
            if raw is None:
                break
            batches.append(raw)
        stored = read_back(batches, tenant, request_id)
        return None if stored is None else RedisClaim(stored, self, place, owner)

    def own(self, entry: Entry, claim: RedisClaim) -> None:
        """Write on behind what was stored of an adopted request."""
        self._owners[entry] = claim.owner
        self._written[entry] = 1 + len(claim.stored.pieces)
        self.changed(entry)

    def num_safe(self, entry: Entry) -> int | None:
        """Implements `JournalStore.num_safe`."""
        is_waiting = entry in self._dirty or entry in self._owners
        if not self.is_up or not is_waiting:
            return None
        return max(0, self._written.get(entry, 0) - 1)  # the first item is the request

    async def forget(self, tenant: str, request_id: str) -> bool:
        """Implements `JournalStore.forget`."""
        place = self._sealer.place(tenant, request_id)
        async with self._writing:  # what is being written would come back
            for entry in [one for one in {**self._dirty, **self._owners} if one.asked.name == (tenant, request_id)]:
                self._forget(entry)
            return await self._call(self._redis.delete(f"ts:j:{place}", f"ts:o:{place}")) is not None

    async def close(self) -> None:
        """Implements `JournalStore.close`."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._writer is not None:
            for _ in range(CANCELS):  # a library may swallow one
                self._writer.cancel()
                if (await asyncio.wait({self._writer}, timeout=CALL_S))[0]:
                    break
        if self._dirty and self.is_up:
            await self._write()
        try:
            async with asyncio.timeout(CALL_S):
                await self._redis.aclose()
        except Exception as error:  # of any kind: nothing is left to do
            log.debug("journal store: %s", error)

    async def claim(self, place: str, owner: bytes, asked: Asked) -> bytes | None:
        """Replace the owner of a place by ourselves. None: somebody else has done so, or Redis does not answer."""
        ours = self._sealer.seal(self._router, f"owner/{place}")
        claimed = await self._call(self._redis.eval(_CLAIM, 1, f"ts:o:{place}", owner, ours, self._keep_ms(asked)))
        return ours if claimed == 1 else None

    async def _write_for_ever(self) -> None:
        while not self._is_closed:
            await self._news.wait()
            self._news.clear()
            if not await self._write():
                await asyncio.sleep(RETRY_S)
            await asyncio.sleep(TICK_S)
            if self._dirty:
                self._news.set()

    def _keep_ms(self, asked: Asked) -> int:
        return max(1000, round(self._keep_s(asked) * 1e3))

    async def _write(self) -> bool:
        """Write one batch. False: Redis failed; nothing is lost, and all is written again later."""
        async with self._writing:
            return await self._write_batch()

    async def _write_batch(self) -> bool:
        pipeline = self._redis.pipeline(transaction=False)
        chosen: list[tuple[Entry, int]] = []
        num_bytes = 0
        for entry in list(self._dirty):
            if num_bytes > MAX_BATCH_BYTES:
                break
            batch = batch_of(entry, self._written.get(entry, 0))
            if not batch.items:
                del self._dirty[entry]
                continue
            place = self._sealer.place(*entry.asked.name)
            sealed = self._sealer.seal(batch.SerializeToString(), place)
            owner = self._owners.setdefault(entry, self._sealer.seal(self._router, f"owner/{place}"))
            keep_ms = self._keep_ms(entry.asked)
            pipeline.eval(_WRITE, 2, f"ts:j:{place}", f"ts:o:{place}", owner, sealed, keep_ms, MAX_VALUES)
            chosen.append((entry, batch.first + len(batch.items)))
            num_bytes += len(sealed)
            del self._dirty[entry]
        if not chosen:
            return True
        was_up = self.is_up
        answers = await self._call(pipeline.execute(raise_on_error=False))
        if not isinstance(answers, list) or len(answers) != len(chosen) or any(a not in (0, 1) for a in answers):
            if answers is not None:
                self.is_up = was_up  # it answers, and takes nothing
                self._failed(f"answered {str(answers)[:200]}")
            self._dirty = dict.fromkeys(entry for entry, _ in chosen) | self._dirty
            for entry in self._dirty:
                entry.changed()  # what waited to be stored is given out
            return False
        for (entry, written), answer in zip(chosen, answers, strict=True):
            self._written[entry] = written
            if answer == 0:
                self._forget(entry)
                self._fenced(entry)
            elif entry.is_over and entry not in self._dirty:
                self._forget(entry)
            entry.changed()
        return True

    def _forget(self, entry: Entry) -> None:
        for known in (self._dirty, self._owners, self._written):
            known.pop(entry, None)

    async def _call(self, call: Awaitable[Reply]) -> Reply | None:
        """The answer of Redis; None: it failed, or took too long."""
        try:
            async with asyncio.timeout(CALL_S):
                answer = await call
        except Exception as error:  # of any kind: garbage from Redis makes its client raise any of them
            self._failed(f"{type(error).__name__}: {error}")
            return None
        self.is_up = True
        return answer

    def _failed(self, what: str) -> None:
        self.num_failures += 1
        if self.is_up:
            log.warning("journal store: %s; until it answers, streams of a lost router cannot be adopted", what)
        self.is_up = False


class RedisClaim:
    """Implements `Claim`."""

    def __init__(self, stored: Stored, store: RedisStore, place: str, owner: Any) -> None:
        self.stored = stored
        self.owner: bytes = owner
        self._store = store
        self._place = place

    async def take(self) -> bool:
        """Implements `Claim.take`."""
        ours = await self._store.claim(self._place, self.owner, self.stored.asked)
        if ours is None:
            return False
        self.owner = ours
        return True


def _value_of(entry: Any) -> Any:
    """The field `v` of a stream's entry, if it has the form of one."""
    try:
        return entry[1][b"v"]
    except (TypeError, KeyError, IndexError):
        return None
