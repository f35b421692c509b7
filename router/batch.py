"""Several prompts of one body as one request: their pieces in one stream, their names under one. Knows no protocol.

choice of the whole = prompt * n + choice of that prompt's request, named `<name>-<prompt>`
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace
from typing import Any

from .pieces import Piece, Usage

MAX_NAMES = 2_000  # lists whose name is remembered: as many as the journal remembers requests
_PIECES_AHEAD = 4  # per prompt: beyond them the streams wait, and their own bounds hold

# Of several states the first of these tells most.
_STATES = ("running", "failed", "rejected", "cancelled", "finished")


def name_of(name: str, prompt: int) -> str:
    """The request that one prompt of a list becomes."""
    return f"{name}-{prompt}"


async def merged(streams: Sequence[AsyncGenerator[Piece, None]], num_choices: int) -> AsyncGenerator[Piece, None]:
    """The pieces of all streams as they come, `usage` of all with the very last one; each stream's last has its own.

    The first error of any ends it, and it ends the others; so does closing it.
    """
    arrived: asyncio.Queue[tuple[int, Piece | Exception]] = asyncio.Queue(_PIECES_AHEAD * len(streams))
    pumps = [asyncio.create_task(_pump(place, stream, arrived)) for place, stream in enumerate(streams)]
    usage, num_unfinished = Usage(0, 0, 0), len(streams)
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
    stream: AsyncGenerator[Piece, None],
    arrived: asyncio.Queue[tuple[int, Piece | Exception]],
) -> None:
    async with contextlib.aclosing(stream):
        try:
            async for piece in stream:
                await arrived.put((place, piece))
        except Exception as error:
            await arrived.put((place, error))


def _sum(one: Usage, other: Usage) -> Usage:
    return Usage(
        one.prompt_tokens + other.prompt_tokens,
        one.completion_tokens + other.completion_tokens,
        one.cached_tokens + other.cached_tokens,
    )


class Lists:
    """The names of the last lists, and how many prompts each had. Every tenant has names of its own."""

    def __init__(self) -> None:
        self._num_prompts: OrderedDict[tuple[str, str], int] = OrderedDict()

    def add(self, tenant: str, name: str, num_prompts: int) -> None:
        """Remember a list; the oldest one makes room."""
        self._num_prompts[tenant, name] = num_prompts
        self._num_prompts.move_to_end((tenant, name))
        while len(self._num_prompts) > MAX_NAMES:
            self._num_prompts.popitem(last=False)

    def requests(self, tenant: str, name: str) -> list[str]:
        """The requests that a tenant's list became; none: it has no list of that name."""
        return [name_of(name, prompt) for prompt in range(self._num_prompts.get((tenant, name), 0))]


def explain_list(
    name: str, names: Sequence[str], explain: Callable[[str], dict[str, Any] | None]
) -> dict[str, Any] | None:
    """What is known of a list: its state, and everything of each of its requests that is still known; None: nothing."""
    known = [explained for one in names if (explained := explain(one)) is not None]
    states = {explained["state"] for explained in known}
    if not known:
        return None
    state = next(state for state in _STATES if state in states)
    return {"request_id": name, "state": state, "num_prompts": len(names), "prompts": known}
