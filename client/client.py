"""SDK for synchronous Python: calls block, streams are iterators. calls.py makes and reads the messages."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import grpc

from ..client import calls
from ..core.errors import TwostrokeError
from .calls import Call, ChatOptions, GenerateOptions, Rpc
from .channel import Endpoint, File, GrpcTransport, Replies, Tls, Transport, check_timeout
from .messages import Message, TemplateOptions
from .reconnection import SHORTEST_S, Reconnection
from .status import from_rpc_error
from .values import Chunk, Completion, ModelCard, Tokens

Result = TypeVar("Result")


class CompletionStream(Iterator[Chunk]):
    """Pieces of an answer as they arrive. Closing it, leaving its `with`, or dropping it cancels the request."""

    def __init__(
        self,
        replies: Replies,
        call: Call[Chunk],
        explain_failure: Callable[[Any], TwostrokeError],
        reopen: Callable[[Rpc, Any], Replies],
    ) -> None:
        self._replies = replies
        self._reopen = reopen
        self._reconnection = Reconnection(call)
        self._call = call
        self._explain_failure = explain_failure
        self._over = False
        self.request_id = ""  # known with the first piece

    def __next__(self) -> Chunk:
        """Wait for the next piece.

        Raises:
            TwostrokeError: the request failed, its timeout passed, or pieces were lost.
        """
        if self._over:
            raise StopIteration
        try:
            chunk = self._call.read(self._next_reply())
        except StopIteration:
            self._over = True
            self._call.finish()
            raise
        except grpc.RpcError as failure:
            if self._over:  # another thread closed the stream
                raise StopIteration from None
            self._over = True
            raise self._explain_failure(failure) from failure
        except BaseException:
            self.close()
            raise
        self.request_id = chunk.request_id
        self._reconnection.heard(chunk)
        return chunk

    def _next_reply(self) -> Any:
        """The next message; a lost connection of a resumable stream is opened again."""
        while True:
            try:
                return next(self._replies)
            except grpc.RpcError as failure:
                again = None if self._over else self._reconnection.after(failure, self._explain_failure(failure))
                if again is None:
                    raise
                time.sleep(again.wait_s)
                self._replies = self._reopen(again.rpc, again.request)

    def close(self) -> None:
        """Cancel the request if it still runs. Iteration then stops."""
        if not self._over:
            self._over = True
            self._replies.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # partly initialised, or the interpreter is shutting down
            self.close()


class Client:
    """Connection to a Twostroke router. Safe to share between threads. Close it, or use it in a `with`.

    `address` is host:port of the router's gRPC API. Connections to this machine are not encrypted; another machine
    needs `tls`, or an explicit `insecure=True`. Every failed call raises a subclass of `TwostrokeError`.
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
        transport: Transport | None = None,
    ) -> None:
        """`tls`: True, or a file of the server's authority; `cert`, `key`: files of ours, where the server wants them.

        Connects at the first call. `transport` replaces the network; the caller closes it.

        Raises:
            ConfigError: the address is invalid, or the server is on another machine without `tls` or `insecure`.
        """
        endpoint = Endpoint(address, api_key, Tls.of(tls, cert, key), insecure)
        self._grpc = GrpcTransport(endpoint) if transport is None else None
        self._transport: Transport = transport or self._grpc  # type: ignore[assignment]  # one of them is there
        self._address = address
        self._timeout_s = check_timeout(timeout_s)

    def generate(self, prompt: str | Sequence[int], **options: Unpack[GenerateOptions]) -> Completion:
        """Complete a text (or token ids) and wait for the whole answer."""
        return self._ask(calls.generate(prompt, options))

    def generate_stream(self, prompt: str | Sequence[int], **options: Unpack[GenerateOptions]) -> CompletionStream:
        """Complete a text (or token ids) as a stream."""
        return self._stream(calls.generate_stream(prompt, options))

    def chat(self, messages: Sequence[Message], **options: Unpack[ChatOptions]) -> Completion:
        """Answer a conversation of `{"role": ..., "content": ...}` and wait for the whole answer."""
        return self._ask(calls.chat(messages, options))

    def chat_stream(self, messages: Sequence[Message], **options: Unpack[ChatOptions]) -> CompletionStream:
        """Answer a conversation as a stream."""
        return self._stream(calls.chat_stream(messages, options))

    def resume(self, request_id: str, cursor: str = "", *, n: int = 1) -> CompletionStream:
        """Go on with a resumable stream behind the piece with this cursor, at any router; "": from its beginning.

        `n`: its number of choices. The stream raises CursorLost if it cannot go on there, and RequestNotFound if no
        router knows it any more.
        """
        return self._stream(calls.resume(request_id, cursor, n))

    def tokenize(
        self, prompt: str | Sequence[Message], *, model: str = "", **options: Unpack[TemplateOptions]
    ) -> Tokens:
        """Token ids of a text, or of a conversation rendered by the chat template."""
        return self._ask(calls.tokenize(prompt, model, options))

    def models(self) -> tuple[ModelCard, ...]:
        """List the served models."""
        return self._ask(calls.models())

    def abort(self, request_id: str) -> bool:
        """Cancel a running request that was sent with the same API key. Returns whether it was found."""
        return self._ask(calls.abort(request_id))

    def explain(self, request_id: str) -> dict[str, Any]:
        """Explain a request: its workers, the reasons of the choice, and its timeline."""
        return self._ask(calls.explain(request_id))

    def cluster(self) -> dict[str, Any]:
        """State of the cluster: its workers with their roles and load."""
        return self._ask(calls.cluster())

    def close(self) -> None:
        """Cancel running calls and close the connection."""
        if self._grpc is not None:
            self._grpc.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, call: Call[Result]) -> Result:
        replies = self._open(call)
        try:
            return call.read(next(replies))
        except grpc.RpcError as failure:
            raise self._explain_failure(failure) from failure
        except BaseException:  # e.g. Ctrl-C: nothing waits for the answer, so the server must stop
            replies.cancel()
            raise

    def _stream(self, call: Call[Chunk]) -> CompletionStream:
        end_s = time.monotonic() + self._timeout_of(call)

        def reopen(rpc: Rpc, request: Any) -> Replies:
            return self._transport.open(rpc, request, max(SHORTEST_S, end_s - time.monotonic()))

        return CompletionStream(self._open(call), call, self._explain_failure, reopen)

    def _open(self, call: Call[Any]) -> Replies:
        return self._transport.open(call.rpc, call.request, self._timeout_of(call))

    def _timeout_of(self, call: Call[Any]) -> float:
        return self._timeout_s if call.timeout_s is None else check_timeout(call.timeout_s)

    def _explain_failure(self, failure: Any) -> TwostrokeError:
        return from_rpc_error(failure, self._address)
