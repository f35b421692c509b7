"""Greedy streams without an end, each compared with the answer of an undisturbed cluster."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self

from twostroke.client.async_client import AsyncClient

PROMPT = "the same question again and again, and long enough for several blocks of sixteen bytes "
TOKENS = 24
ANSWERS_S = 120.0


class Asking:
    """`num_streams` clients that ask one after the other; a failed or changed stream fails the test that leaves it."""

    def __init__(self, client: AsyncClient, num_streams: int, tokens: int = TOKENS) -> None:
        self._client, self._num_streams, self._tokens = client, num_streams, tokens
        self._expected: dict[int, str] = {}
        self._is_over = asyncio.Event()
        self._asking: asyncio.Future[list[None]] | None = None
        self.num_answers = 0

    async def __aenter__(self) -> Self:
        for number in range(self._num_streams):
            self._expected[number] = await self._answer(number)
        self._asking = asyncio.gather(*(self._ask(number) for number in self._expected))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        assert self._asking is not None
        async with asyncio.timeout(ANSWERS_S):
            await self._asking

    async def more(self, num_answers: int) -> None:
        """Wait for so many further answers."""
        assert self._asking is not None
        until = self.num_answers + num_answers
        async with asyncio.timeout(ANSWERS_S):
            while self.num_answers < until and not self._asking.done():
                await asyncio.sleep(0.02)

    async def _ask(self, number: int) -> None:
        while not self._is_over.is_set():
            assert await self._answer(number) == self._expected[number]
            self.num_answers += 1

    async def _answer(self, number: int) -> str:
        text = ""
        stream = self._client.generate_stream(
            f"{PROMPT}{number}", max_tokens=self._tokens, temperature=0, ignore_eos=True
        )
        async for piece in stream:
            text += piece.text
        return text
