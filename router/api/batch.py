"""A list of prompts in one body: one request per prompt, their pieces merged in one stream. Knows no protocol.

choice in the merged stream = prompt * n + choice of that prompt's request, which is named `<name>-<prompt>`
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace
from typing import Any

from ...core.errors import InternalError, Overloaded
from ..requests.pieces import OutputDelta, TokenUsage

MAX_NAMES = 2_000  # lists whose names are remembered: the same number as ended requests in the history
_PIECES_AHEAD = 4  # buffered per prompt; with more, the streams wait and their own bounds apply
_RETRY_S = 0.5
CHOICES_AT_ONCE = 64  # of one list: a quarter of a worker's waiting queue, so that other requests find room
TOKENS_AT_ONCE = 65_536  # of the prompts of one list, for the same reason

Start = Callable[[], AsyncGenerator[OutputDelta, None]]

# The state of a list is the first of these that one of its requests has.
_STATES = ("running", "failed", "rejected", "cancelled", "finished")


def name_of(name: str, prompt: int) -> str:
    """Request id of one prompt of a list."""
    return f"{name}-{prompt}"


def streams_at_once(num_choices: int, most_prompt_tokens: int) -> int:
    """Number of prompts of a list that run at once, so that a worker's queue has room for them."""
    return max(1, min(CHOICES_AT_ONCE // num_choices, TOKENS_AT_ONCE // most_prompt_tokens))


async def merged(
    starts: Sequence[Start], num_choices: int, at_once: int, patience_s: float
) -> AsyncGenerator[OutputDelta, None]:
    """Merge all streams; yields their pieces as they come, the sum of their `usage` with the very last one.

    `at_once` streams run; the others begin when one of these has ended, and retry for `patience_s` if the cluster is
    full then. The first error of a stream ends the merged stream and all others; so does closing it.
    """
    arrived: asyncio.Queue[tuple[int, OutputDelta | Exception]] = asyncio.Queue(_PIECES_AHEAD * at_once)
    slots = asyncio.Semaphore(at_once)
    patience = [0.0 if place < at_once else patience_s for place in range(len(starts))]
    pumps = [
        asyncio.create_task(_pump(place, _in_turn(start, patience[place]), slots, arrived))
        for place, start in enumerate(starts)
    ]
    usage, num_unfinished = TokenUsage(0, 0, 0), len(starts)
    try:
        while num_unfinished:
            place, piece = await arrived.get()
            if isinstance(piece, Exception):
                raise piece
            if piece.usage is not None:  # a stream's last piece
                usage = _sum(usage, piece.usage)
                num_unfinished -= 1
            choice = place * num_choices + piece.choice
            yield replace(piece, choice=choice, usage=None if num_unfinished else usage)
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def _pump(
    place: int,
    stream: AsyncGenerator[OutputDelta, None],
    slots: asyncio.Semaphore,
    arrived: asyncio.Queue[tuple[int, OutputDelta | Exception]],
) -> None:
    async with slots, contextlib.aclosing(stream):
        usage = None
        try:
            async for piece in stream:
                usage = piece.usage
                await arrived.put((place, piece))
            if usage is None:  # the reader would wait for the last piece for ever
                raise InternalError(f"prompt {place} ended without its last piece")
        except Exception as error:
            await arrived.put((place, error))


async def _in_turn(start: Start, patience_s: float) -> AsyncGenerator[OutputDelta, None]:
    """Run a stream; restart it for `patience_s` while the cluster is full and no piece has come."""
    loop = asyncio.get_running_loop()
    end_s = loop.time() + patience_s
    while True:
        has_begun = False
        try:
            async with contextlib.aclosing(start()) as stream:
                async for piece in stream:
                    has_begun = True
                    yield piece
            return
        except Overloaded as error:
            if has_begun or loop.time() >= end_s:
                raise
            await asyncio.sleep(min(error.retry_after_s or _RETRY_S, _RETRY_S))


def _sum(one: TokenUsage, other: TokenUsage) -> TokenUsage:
    return TokenUsage(
        one.prompt_tokens + other.prompt_tokens,
        one.completion_tokens + other.completion_tokens,
        one.cached_tokens + other.cached_tokens,
        one.draft_tokens + other.draft_tokens,
        one.accepted_tokens + other.accepted_tokens,
    )


class Lists:
    """Names of the last lists, with their numbers of prompts. Names are separate for each tenant."""

    def __init__(self) -> None:
        self._num_prompts: OrderedDict[tuple[str, str], int] = OrderedDict()

    def add(self, tenant: str, name: str, num_prompts: int) -> int:
        """Add a list; the oldest one is removed if necessary. Returns the size of the last list of that name, or 0."""
        before = self._num_prompts.get((tenant, name), 0)
        self._num_prompts[tenant, name] = num_prompts
        self._num_prompts.move_to_end((tenant, name))
        while len(self._num_prompts) > MAX_NAMES:
            self._num_prompts.popitem(last=False)
        return before

    def requests(self, tenant: str, name: str) -> list[str]:
        """Request ids of a tenant's list; empty if it has no list of that name."""
        return [name_of(name, prompt) for prompt in range(self._num_prompts.get((tenant, name), 0))]


def explain_list(
    name: str, names: Sequence[str], explain: Callable[[str], dict[str, Any] | None]
) -> dict[str, Any] | None:
    """Report of a list: its state, and the reports of its requests that are still known; None: none is known."""
    known = [explained for one in names if (explained := explain(one)) is not None]
    states = {explained["state"] for explained in known}
    if not known:
        return None
    state = next(state for state in _STATES if state in states)
    return {"request_id": name, "state": state, "num_prompts": len(names), "prompts": known}
