"""Copies of other workers' blocks: fetches what a decode worker offers, into the prefix cache. Knows no stream.

    KeepRequest ─▶ engine Submit (PEER) ─▶ Promised ─▶ Bind ─▶ Bound ─▶ fetch ─▶ KvComplete ─▶ Ended: all is cached

A sequence of the engine holds the blocks while they are written; nothing is computed for it. When its last block is
there it ends, and its blocks are cached like those of any sequence. One that misses a block leaves none.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from typing import NamedTuple

from ...core.errors import InvalidRequest
from ...core.ports import check_address
from ...core.request import CacheScope, SamplingParams, SequenceKey
from ...decode_worker.fetch import FetchHost, KvFetch
from ...decode_worker.pull import KvPullTools
from ...engine.facts import FaceFacts
from ...engine.link import messages as link
from ...engine.link.client import SequenceEvent
from ...kv.handover.fetching import BlockFetch, FetchEnd, Wanted
from ...kv.handover.machine import Fetched
from ...kv.keys import PromptNames
from ...kv.messages import scope_from_wire
from ...kv.spec import HASH_BLOCK_TOKENS
from ...protos import handover_pb2
from .keeping import why_not_kept

log = logging.getLogger(__name__)

KEEP_S = 5.0  # longest time for one copy
LOWEST = -1_000_000  # priority: every other sequence goes first

Connect = Callable[[SequenceKey, str, float], FetchHost]
"""Opens a stream of cached blocks for a sequence from an address, for at most so many seconds."""

Replied = Callable[[handover_pb2.KeepReply], None]


class Copied(NamedTuple):
    """The chain of a copy. Implements `Lacking` of decode_worker/fetch.py."""

    engine_key: SequenceKey
    scope: CacheScope
    names: PromptNames
    token_ids: tuple[int, ...]
    address: str
    key: SequenceKey = SequenceKey("", 0)


class KeepTask:
    """One copy, from its request until its sequence has ended."""

    def __init__(
        self, copied: Copied, facts: FaceFacts, tools: KvPullTools, connect: Connect, over: Callable[[int], None]
    ) -> None:
        """`over` gets the number of leading tokens that are cached, once, when the sequence has ended."""
        self.copied = copied
        self.fetch: KvFetch | None = None  # under way
        self._facts = facts
        self._tools = tools
        self._connect = connect
        self._over = over
        self._deadline_s = tools.clock.now_s() + KEEP_S
        self._held = 0
        self._is_whole = False
        self.is_over = False

    def start(self) -> None:
        """Submit the sequence to the engine."""
        copied, dispatcher = self.copied, self._tools.dispatcher
        dispatcher.own(copied.engine_key, self._handle)
        dispatcher.send(
            link.Submit(
                key=copied.engine_key,
                source=link.Source.PEER,
                prompt_ids=copied.token_ids,
                identities=copied.names.identities,
                identity_root=copied.names.root,
                params=SamplingParams(max_tokens=1),
                priority=LOWEST,
                deadline_s=self._deadline_s,
            )
        )

    def cancel(self) -> None:
        """Make no copy after all. No effect after its end."""
        if not self.is_over:
            self._tools.dispatcher.send(link.CancelSequence(self.copied.engine_key))

    def _handle(self, event: SequenceEvent) -> None:
        match event:
            case link.Promised(key, held_tokens):
                self._held = held_tokens
                self._tools.dispatcher.send(link.Bind(key))
            case link.NotYet():
                self.cancel()  # others need the room
            case link.Bound():
                self._get_blocks()
            case link.KvWritten(_, token_start, token_count):
                if self.fetch is not None:
                    self.fetch.written(token_start, token_count)
            case link.Ended():
                self.is_over = True
                if self.fetch is not None:
                    self.fetch.cancel()
                    self.fetch = None
                self._over(len(self.copied.token_ids) if self._is_whole else self._held)
            case _:
                log.debug("%s: %s is nothing to a copy", self.copied.engine_key, type(event).__name__)

    def _get_blocks(self) -> None:
        copied, model, now_s = self.copied, self._facts.model, self._tools.clock.now_s()
        identities = copied.names.identities[self._held // HASH_BLOCK_TOKENS :]
        numerics_class = model.numerics_class if model.deterministic else None
        wanted = Wanted(identities, self._held, numerics_class, model.kv_spec.main.windowed)
        fetch = BlockFetch(wanted, self._tools.timing.silence_s, self._deadline_s, now_s)
        host = self._connect(copied.engine_key, copied.address, KEEP_S)
        self.fetch = KvFetch(fetch, host, copied, self._tools, self._fetched)

    def _fetched(self, fetched: Fetched) -> None:
        key = self.copied.engine_key
        self.fetch = None
        self._is_whole = fetched.end == FetchEnd.COMPLETE
        if self._is_whole:
            self._tools.dispatcher.send(link.KvComplete(key, 0))  # which ends it: it wants one token
        else:
            self.cancel()


class Copies:
    """The copies of one worker. All methods are called on one loop and return at once."""

    def __init__(self, facts: FaceFacts, tools: KvPullTools, connect: Connect, is_draining: Callable[[], bool]) -> None:
        self.num_keeping = 0  # copies whose sequences have not ended
        self._facts = facts
        self._tools = tools
        self._connect = connect
        self._is_draining = is_draining
        self._keys = itertools.count(1)

    def begin(self, wanted: handover_pb2.KeepRequest, replied: Replied) -> KeepTask | None:
        """Begin a copy, which its owner cancels when the caller leaves; None: none is made.

        `replied` gets the reply, once: from inside this call if no copy is made, else at the copy's end.

        Raises:
            InvalidRequest: no whole blocks, ids outside the vocabulary, or no address.
        """
        copied, counters = self._copied(wanted), self._tools.counters
        num_blocks = -(-len(copied.token_ids) // self._facts.block_tokens)
        why = why_not_kept(self._tools.dispatcher.last_load, num_blocks, self.num_keeping)
        if self._is_draining():
            why = "the worker is draining"
        if copied.names.root != wanted.identity_root:
            why = "weights, numerics or keys differ"
        if why:
            counters["keeps_refused"] += 1
            replied(handover_pb2.KeepReply(reason=why))
            return None

        def over(kept_tokens: int) -> None:
            self.num_keeping -= 1
            is_whole = kept_tokens == len(copied.token_ids)
            counters["kept_copies" if is_whole else "keeps_failed"] += 1
            replied(handover_pb2.KeepReply(kept_tokens=kept_tokens, reason="" if is_whole else "not all blocks came"))

        self.num_keeping += 1
        task = KeepTask(copied, self._facts, self._tools, self._connect, over)
        task.start()
        return task

    def _copied(self, wanted: handover_pb2.KeepRequest) -> Copied:
        token_ids, scope = tuple(wanted.token_ids), scope_from_wire(wanted)
        self._facts.model.check_prompt(token_ids, max(0, len(token_ids) - 1))  # the engine says if it is too long
        if len(token_ids) % HASH_BLOCK_TOKENS:
            raise InvalidRequest(f"{len(token_ids)} token ids; must be whole blocks of {HASH_BLOCK_TOKENS}")
        key = SequenceKey(f"keep/{next(self._keys)}", 0)
        address = check_address(wanted.address, "address")
        return Copied(key, scope, self._facts.namer.name(token_ids, scope), token_ids, address)
