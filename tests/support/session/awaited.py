"""AsyncClient with the plain client's manners, so that one set of tests holds both."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from typing import Any

from twostroke import AsyncClient


class Awaited:
    """AsyncClient with the plain client's manners: each call runs on a loop of ours until it is done."""

    def __init__(self, address: str, **options: Any) -> None:
        self._runner = asyncio.Runner()
        self._client = AsyncClient(address, **options)

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            async def run() -> Any:
                result = method(*args, **kwargs)
                return AwaitedStream(self._runner, result) if name.endswith("_stream") else await result

            return self._runner.run(run())

        return call

    def close(self) -> None:
        self._runner.run(self._client.close())
        self._runner.close()


class AwaitedStream:
    def __init__(self, runner: asyncio.Runner, stream: Any) -> None:
        self._runner, self._stream = runner, stream

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        async def step() -> Any:
            return await anext(self._stream, None)

        chunk = self._runner.run(step())
        if chunk is None:
            raise StopIteration
        return chunk

    def __enter__(self) -> AwaitedStream:
        self._runner.run(self._stream.__aenter__())
        return self

    def __exit__(self, *error: object) -> None:
        self._runner.run(self._stream.__aexit__(None, None, None))

    def close(self) -> None:
        self._runner.run(self._stream.close())

    def drop(self) -> None:
        """Forget the stream and let the loop turn once, as a running program's would."""
        del self._stream
        gc.collect()
        self._runner.run(asyncio.sleep(0.05))
