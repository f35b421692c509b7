"""Copies of other workers' blocks: fetches what a decode worker offers, into the prefix cache. Knows no stream.

`CopyTask` is what all copies have in common; those that a prefill worker makes for its own jobs are in returns.py.

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
from ...kv.spec import HASH_BLOCK_TOKENS, WindowedLayers
from ...protos import handover_pb2
from .keeping import why_not_kept

log = logging.getLogger(__name__)

KEEP_S = 5.0  # longest time for one copy
LOWEST = -1_000_000  # priority: every other sequence goes first

Connect = Callable[[SequenceKey, str, float], FetchHost]
"""Opens a stream of cached blocks for a sequence from an address, for at most so many seconds."""

Asks = Callable[[int, bytes | None, WindowedLayers | None], Wanted]
"""What is asked for behind so many tokens, in frames of this numerics class (None: any), perhaps without windows."""

Replied = Callable[[handover_pb2.KeepReply], None]


class Copied(NamedTuple):
    """The chain of a copy. Implements `Lacking` of decode_worker/fetch.py."""

    engine_key: SequenceKey
    scope: CacheScope
    names: PromptNames
    token_ids: tuple[int, ...]
    address: str = ""  # of the only source; empty: others say it
    key: SequenceKey = SequenceKey("", 0)


class CopyTools(NamedTuple):
    """Dependencies shared by all copies of a worker."""

    facts: FaceFacts
    pull: KvPullTools
    connect: Connect


class CopyTask:
    """A sequence of the engine whose blocks other workers give, from its Submit until it has ended."""

    def __init__(self, copied: Copied, deadline_s: float, priority: int, tools: CopyTools) -> None:
        """`deadline_s`: of the whole copy, in this worker's clock."""
        self.copied = copied
        self.fetch: KvFetch | None = None  # under way
        self.held = 0  # leading tokens that are here
        self.is_over = False
        self._deadline_s = deadline_s
        self._priority = priority
        self._tools = tools

    def start(self) -> None:
        """Submit the sequence to the engine."""
        copied, dispatcher = self.copied, self._tools.pull.dispatcher
        dispatcher.own(copied.engine_key, self._handle)
        dispatcher.send(
            link.Submit(
                key=copied.engine_key,
                source=link.Source.PEER,
                prompt_ids=copied.token_ids,
                identities=copied.names.identities,
                identity_root=copied.names.root,
                params=SamplingParams(max_tokens=1),
                priority=self._priority,
                deadline_s=self._deadline_s,
            )
        )

    def cancel(self) -> None:
        """Make no copy after all. No effect after its end."""
        if not self.is_over:
            self._tools.pull.dispatcher.send(link.CancelSequence(self.copied.engine_key))

    # ------------------------------------------------------------------ what a copy decides

    def _promised(self) -> None:
        """There is room; `held` is known."""
        self._tools.pull.dispatcher.send(link.Bind(self.copied.engine_key))

    def _bound(self) -> None:
        """The blocks are bound: fetch what is missing."""
        raise NotImplementedError

    def _ended(self, ended: link.Ended) -> None:
        """The sequence is over. Called once."""
        raise NotImplementedError

    # ------------------------------------------------------------------ inside

    def _handle(self, event: SequenceEvent) -> None:
        match event:
            case link.Promised(_, held_tokens):
                self.held = held_tokens
                self._promised()
            case link.NotYet():
                self.cancel()  # others need the room
            case link.Bound():
                self._bound()
            case link.KvWritten(_, token_start, token_count):
                if self.fetch is not None:
                    self.fetch.written(token_start, token_count)
            case link.Ended():
                self.is_over = True
                if self.fetch is not None:
                    self.fetch.cancel()
                    self.fetch = None
                self._ended(event)
            case _:
                log.debug("%s: %s is nothing to a copy", self.copied.engine_key, type(event).__name__)

    def _fetch(self, wanted: Asks, address: str, over: Callable[[Fetched, BlockFetch], None]) -> None:
        """Fetch what `wanted` says of the blocks behind `held`, from one source."""
        copied, pull, model = self.copied, self._tools.pull, self._tools.facts.model
        now_s = pull.clock.now_s()
        numerics_class = model.numerics_class if model.deterministic else None
        asked = wanted(self.held, numerics_class, model.kv_spec.main.windowed)
        fetch = BlockFetch(asked, pull.timing.silence_s, self._deadline_s, now_s)
        host = self._tools.connect(copied.engine_key, address, max(0.001, self._deadline_s - now_s))

        def ended(fetched: Fetched) -> None:
            self.fetch = None
            over(fetched, fetch)

        self.fetch = KvFetch(fetch, host, copied, pull, ended)


class KeepTask(CopyTask):
    """One copy for another worker, from its request until its sequence has ended."""

    def __init__(self, copied: Copied, tools: CopyTools, over: Callable[[int], None]) -> None:
        """`over` gets the number of leading tokens that are cached, once, when the sequence has ended."""
        super().__init__(copied, tools.pull.clock.now_s() + KEEP_S, LOWEST, tools)
        self._over = over
        self._is_whole = False

    def _bound(self) -> None:
        names = self.copied.names

        def wanted(held: int, numerics_class: bytes | None, windowed: WindowedLayers | None) -> Wanted:
            return Wanted(names.identities[held // HASH_BLOCK_TOKENS :], held, numerics_class, windowed)

        self._fetch(wanted, self.copied.address, lambda fetched, _: self._fetched(fetched))

    def _fetched(self, fetched: Fetched) -> None:
        key = self.copied.engine_key
        self._is_whole = fetched.end == FetchEnd.COMPLETE
        if self._is_whole:
            self._tools.pull.dispatcher.send(link.KvComplete(key, 0))  # which ends it: it wants one token
        else:
            self.cancel()

    def _ended(self, ended: link.Ended) -> None:
        del ended
        self._over(len(self.copied.token_ids) if self._is_whole else self.held)


class Copies:
    """The copies of one worker. All methods are called on one loop and return at once."""

    def __init__(self, tools: CopyTools, is_draining: Callable[[], bool]) -> None:
        self.num_keeping = 0  # copies whose sequences have not ended
        self._tools = tools
        self._is_draining = is_draining
        self._keys = itertools.count(1)

    def begin(self, wanted: handover_pb2.KeepRequest, replied: Replied) -> KeepTask | None:
        """Begin a copy, which its owner cancels when the caller leaves; None: none is made.

        `replied` gets the reply, once: from inside this call if no copy is made, else at the copy's end.

        Raises:
            InvalidRequest: no whole blocks, ids outside the vocabulary, or no address.
        """
        copied, counters = self._copied(wanted), self._tools.pull.counters
        num_blocks = -(-len(copied.token_ids) // self._tools.facts.block_tokens)
        why = why_not_kept(self._tools.pull.dispatcher.last_load, num_blocks, self.num_keeping)
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
        task = KeepTask(copied, self._tools, over)
        task.start()
        return task

    def _copied(self, wanted: handover_pb2.KeepRequest) -> Copied:
        token_ids, scope = tuple(wanted.token_ids), scope_from_wire(wanted)
        self._tools.facts.model.check_prompt(token_ids, max(0, len(token_ids) - 1))  # the engine says if it is too long
        if len(token_ids) % HASH_BLOCK_TOKENS:
            raise InvalidRequest(f"{len(token_ids)} token ids; must be whole blocks of {HASH_BLOCK_TOKENS}")
        key = SequenceKey(f"keep/{next(self._keys)}", 0)
        address = check_address(wanted.address, "address")
        return Copied(key, scope, self._tools.facts.namer.name(token_ids, scope), token_ids, address)
