"""SDK for asyncio: calls are awaited, streams are asynchronous iterators. calls.py makes and reads the messages."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import grpc

from ..client import calls
from ..core.errors import Cancelled, TwostrokeError
from .calls import Call, ChatOptions, GenerateOptions, Rpc
from .channel import AsyncReplies, AsyncTransport, Endpoint, File, GrpcAsyncTransport, Tls, check_timeout
from .messages import Message, TemplateOptions
from .reconnection import SHORTEST_S, Reconnection
from .status import from_rpc_error
from .values import Chunk, Completion, ModelCard, Tokens

Result = TypeVar("Result")


class AsyncCompletionStream(AsyncIterator[Chunk]):
    """Pieces of an answer as they arrive. Closing it, leaving its `async with`, or dropping it cancels the request.

    Use it only in the event loop in which it was made.
    """

    def __init__(
        self,
        replies: AsyncReplies,
        call: Call[Chunk],
        explain_failure: Callable[[Any], TwostrokeError],
        reopen: Callable[[Rpc, Any], AsyncReplies],
    ) -> None:
        self._replies = replies
        self._reopen = reopen
        self._reconnection = Reconnection(call)
        self._call = call
        self._explain_failure = explain_failure
        self._loop = asyncio.get_running_loop()
        self._over = False
        self.request_id = ""  # known with the first piece

    async def __anext__(self) -> Chunk:
        """Wait for the next piece.

        Raises:
            TwostrokeError: the request failed, its timeout passed, or pieces were lost.
        """
        if self._over:
            raise StopAsyncIteration
        try:
            chunk = self._call.read(await self._next_reply())
        except StopAsyncIteration:
            self._over = True
            self._call.finish()
            raise
        except grpc.RpcError as failure:
            self._over = True
            raise self._explain_failure(failure) from failure
        except asyncio.CancelledError:
            was_closed = self._over
            self._cancel()
            if _is_task_cancelled():
                raise
            if was_closed:
                raise StopAsyncIteration from None
            raise Cancelled("the client was closed during the call") from None
        except BaseException:
            self._cancel()
            raise
        self.request_id = chunk.request_id
        self._reconnection.heard(chunk)
        return chunk

    async def _next_reply(self) -> Any:
        """The next message; a lost connection of a resumable stream is opened again."""
        while True:
            try:
                return await self._replies.__anext__()
            except grpc.RpcError as failure:
                again = self._reconnection.after(failure, self._explain_failure(failure))
                if again is None:
                    raise
                await asyncio.sleep(again.wait_s)
                if self._over:
                    raise StopAsyncIteration from None
                self._replies = self._reopen(again.rpc, again.request)

    async def close(self) -> None:
        """Cancel the request if it still runs. Iteration then stops."""
        self._cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cancel()

    def _cancel(self) -> None:
        if not self._over:
            self._over = True
            self._replies.cancel()

    def __del__(self) -> None:
        # The garbage collector may run in any thread, and after the loop was closed.
        with contextlib.suppress(Exception):
            if not self._over:
                self._over = True
                self._loop.call_soon_threadsafe(self._replies.cancel)


class AsyncClient:
    """Connection to a Twostroke router for one event loop. Close it, or use it in an `async with`.

    Takes the same arguments as `Client`.
    """

    def __init__(
        self,
        address: str = "localhost:8001",
        *,
        api_key: str | None = None,
        timeout_s: float = 60.0,
        tls: Tls | bool | File | None = None,
        cert: File | None = None,
        key: File | None = None,
        insecure: bool = False,
        transport: AsyncTransport | None = None,
    ) -> None:
        """`tls`: True, or a file of the server's authority; `cert`, `key`: files of ours, where the server wants them.

        Connects at the first call. `transport` replaces the network; the caller closes it.

        Raises:
            ConfigError: the address is invalid, or the server is on another machine without `tls` or `insecure`.
        """
        endpoint = Endpoint(address, api_key, Tls.of(tls, cert, key), insecure)
        self._grpc = GrpcAsyncTransport(endpoint) if transport is None else None
        self._transport: AsyncTransport = transport or self._grpc  # type: ignore[assignment]  # one of them is there
        self._address = address
        self._timeout_s = check_timeout(timeout_s)

    async def generate(self, prompt: str | Sequence[int], **options: Unpack[GenerateOptions]) -> Completion:
        """Complete a text (or token ids) and wait for the whole answer."""
        return await self._ask(calls.generate(prompt, options))

    def generate_stream(self, prompt: str | Sequence[int], **options: Unpack[GenerateOptions]) -> AsyncCompletionStream:
        """Complete a text (or token ids) as a stream. Do not await the result: iterate it."""
        return self._stream(calls.generate_stream(prompt, options))

    async def chat(self, messages: Sequence[Message], **options: Unpack[ChatOptions]) -> Completion:
        """Answer a conversation of `{"role": ..., "content": ...}` and wait for the whole answer."""
        return await self._ask(calls.chat(messages, options))

    def chat_stream(self, messages: Sequence[Message], **options: Unpack[ChatOptions]) -> AsyncCompletionStream:
        """Answer a conversation as a stream. Do not await the result: iterate it."""
        return self._stream(calls.chat_stream(messages, options))

    def resume(self, request_id: str, cursor: str = "", *, n: int = 1) -> AsyncCompletionStream:
        """Go on with a resumable stream behind the piece with this cursor, at any router; "": from its beginning.

        `n`: its number of choices. The stream raises CursorLost if it cannot go on there, and RequestNotFound if no
        router knows it any more.
        """
        return self._stream(calls.resume(request_id, cursor, n))

    async def tokenize(
        self, prompt: str | Sequence[Message], *, model: str = "", **options: Unpack[TemplateOptions]
    ) -> Tokens:
        """Token ids of a text, or of a conversation rendered by the chat template."""
        return await self._ask(calls.tokenize(prompt, model, options))

    async def models(self) -> tuple[ModelCard, ...]:
        """List the served models."""
        return await self._ask(calls.models())

    async def abort(self, request_id: str) -> bool:
        """Cancel a running request that was sent with the same API key. Returns whether it was found."""
        return await self._ask(calls.abort(request_id))

    async def explain(self, request_id: str) -> dict[str, Any]:
        """Explain a request: its workers, the reasons of the choice, and its timeline."""
        return await self._ask(calls.explain(request_id))

    async def cluster(self) -> dict[str, Any]:
        """State of the cluster: its workers with their roles and load."""
        return await self._ask(calls.cluster())

    async def close(self) -> None:
        """Cancel running calls and close the connection."""
        if self._grpc is not None:
            await self._grpc.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _ask(self, call: Call[Result]) -> Result:
        replies = self._open(call)
        try:
            return call.read(await replies.__anext__())
        except grpc.RpcError as failure:
            raise self._explain_failure(failure) from failure
        except asyncio.CancelledError:  # nothing waits for the answer, so the server must stop
            replies.cancel()
            if _is_task_cancelled():
                raise
            raise Cancelled("the client was closed during the call") from None

    def _stream(self, call: Call[Chunk]) -> AsyncCompletionStream:
        end_s = time.monotonic() + self._timeout_of(call)

        def reopen(rpc: Rpc, request: Any) -> AsyncReplies:
            return self._transport.open(rpc, request, max(SHORTEST_S, end_s - time.monotonic()))

        return AsyncCompletionStream(self._open(call), call, self._explain_failure, reopen)

    def _open(self, call: Call[Any]) -> AsyncReplies:
        return self._transport.open(call.rpc, call.request, self._timeout_of(call))

    def _timeout_of(self, call: Call[Any]) -> float:
        return self._timeout_s if call.timeout_s is None else check_timeout(call.timeout_s)

    def _explain_failure(self, failure: Any) -> TwostrokeError:
        return from_rpc_error(failure, self._address)


def _is_task_cancelled() -> bool:
    """Return whether the waiting task itself was cancelled, and not only the call."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
