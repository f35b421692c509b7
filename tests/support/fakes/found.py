"""A source of addresses that finds what a test says."""

import asyncio
from collections.abc import AsyncGenerator


class Found:
    """The addresses of the last `tell`."""

    name, problem = "found", ""

    def __init__(self, *addresses: str) -> None:
        self.addresses: frozenset[str] = frozenset()
        self._news: asyncio.Queue[frozenset[str]] = asyncio.Queue()
        self.tell(*addresses)

    def tell(self, *addresses: str) -> None:
        """These, and no others, are there from now on."""
        self.addresses = frozenset(addresses)
        self._news.put_nowait(self.addresses)

    async def follow(self) -> AsyncGenerator[frozenset[str], None]:
        """Every set that was told."""
        while True:
            yield await self._news.get()
