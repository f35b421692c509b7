"""Blocks that come back to a prefill worker: fetched from decode workers into its prefix cache. Knows no stream.

    Lacked ─▶ engine Submit (PEER) ─▶ Promised ─▶ Bind ─▶ Bound ─▶ fetch ─▶ the next source … ─▶ Release ─▶ Ended
                                          │ all held      │ NotYet
                                          └───────────────┴──▶ cancelled: the job computes what is not here

Decode produced them (earlier turns of a chat), and the router found that fetching them is cheaper than computing them.
What came without a gap stays cached, however the fetch ends; the job's own sequence then begins behind it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

from ...core.request import FinishReason, SequenceKey
from ...engine.link import messages as link
from ...kv.handover.fetching import BlockFetch
from ...kv.handover.machine import Fetched
from ...kv.handover.sources import NOTHING_FETCHED, FetchedBlocks, SourceLine
from ...kv.keys import PromptNames
from ...kv.spec import HASH_BLOCK_TOKENS
from ...prefill_worker.returns import Lacked
from .copies import Copied, CopyTask, CopyTools

ReturnOver = Callable[[FetchedBlocks], None]


class ReturnTask(CopyTask):
    """The fetches for one job, from its Lacked until their sequence has ended."""

    def __init__(self, copied: Copied, lacked: Lacked, tools: CopyTools, over: ReturnOver) -> None:
        """`over` is called once, when the sequence has ended."""
        deadline_s = lacked.submit.deadline_s
        assert deadline_s is not None, "a job has the deadline of its request"
        super().__init__(copied, deadline_s, lacked.submit.priority, tools)
        self._line = SourceLine(lacked.sources, copied.names.identities, len(copied.token_ids))
        self._told = over
        self._came = NOTHING_FETCHED

    def _promised(self) -> None:
        if self._line.may_help(self.held):
            super()._promised()
        else:
            self.cancel()  # all of it is here already

    def _bound(self) -> None:
        source = self._line.next(self.held)
        if source is None:
            self._tools.pull.dispatcher.send(link.Release(self.copied.engine_key))
            return

        def over(fetched: Fetched, fetch: BlockFetch) -> None:
            num_tokens = fetched.stored_upto - fetch.wanted.first_token
            named = source.worker_id if num_tokens else self._came.source
            self._came = FetchedBlocks(self._came.num_tokens + num_tokens, named, fetched.end)
            self._line.ended(fetched.end)
            self.held = fetched.stored_upto
            self._bound()

        self._fetch(self._line.wanted, source.address, over)

    def _ended(self, ended: link.Ended) -> None:
        kept = ended.reason is FinishReason.STOP  # else the blocks that came are not cached
        counters = self._tools.pull.counters
        counters["prefill_returns_kept" if kept else "prefill_returns_given_up"] += 1
        came = self._came if kept else FetchedBlocks(0, "", self._came.end)
        counters["prefill_fetched_tokens"] += came.num_tokens
        self._told(came)


class Returns:
    """The returns of one worker. All methods are called on one loop and return at once."""

    def __init__(self, tools: CopyTools) -> None:
        self.num_fetching = 0  # returns whose sequences have not ended; the jobs of the worker bound them
        self._tools = tools
        self._keys = itertools.count(1)

    def begin(self, lacked: Lacked, told: ReturnOver) -> ReturnTask | None:
        """Implements `BeginReturn` of prefill_worker/returns.py."""
        copied = self._copied(lacked)
        if copied is None:
            return None

        def over(came: FetchedBlocks) -> None:
            self.num_fetching -= 1
            told(came)

        self.num_fetching += 1
        task = ReturnTask(copied, lacked, self._tools, over)
        task.start()
        return task

    def _copied(self, lacked: Lacked) -> Copied | None:
        """The chain that may come: whole blocks of this worker's pool; None: not one.

        One more token follows it, because the last token of a sequence is never taken from a cache.
        """
        submit = lacked.submit
        most = max((source.num_blocks for source in lacked.sources), default=0) * HASH_BLOCK_TOKENS
        num_tokens = min(most, len(submit.prompt_ids) - 1)
        num_tokens -= num_tokens % self._tools.facts.block_tokens
        if num_tokens <= 0 or submit.params.prompt_logprobs is not None:
            return None
        names = PromptNames(submit.identity_root, submit.identities[: num_tokens // HASH_BLOCK_TOKENS])
        key = SequenceKey(f"{submit.key.request_id}/return{next(self._keys)}", submit.key.choice)
        return Copied(key, lacked.scope, names, submit.prompt_ids[: num_tokens + 1], key=lacked.key)
