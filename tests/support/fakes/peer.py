"""A router's client side as a protocol peer: a real grpc.aio server over a deterministic generator, in a thread."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import grpc.aio

from twostroke.client.status import to_rpc_status
from twostroke.core.errors import Overloaded, TwostrokeError, Unauthenticated, from_code
from twostroke.protos import common_pb2, inference_pb2
from twostroke.protos.inference_pb2_grpc import InferenceServicer, add_InferenceServicer_to_server

API_KEY = "key-1"


class Peer(InferenceServicer):
    """Answers token k of choice c with id 1000c + k and text "c.k "; prompts that begin with "!" ask for trouble.

    "!error CODE RETRY_MS" fails so; "!flaky N" fails N times, then answers; "!skip", "!repeat", "!short", "!mute"
    break a stream; "!slow" waits 50 ms per token; "!hang" answers nothing.
    """

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.metadata: list[dict[str, Any]] = []
        self.time_left_s: list[float | None] = []
        self.attempts = 0
        self.cancelled = threading.Event()

    async def Generate(self, request: Any, context: Any) -> inference_pb2.GenerateResponse:
        return await self._whole(request, context, self._prompt(request))

    async def Chat(self, request: Any, context: Any) -> inference_pb2.GenerateResponse:
        return await self._whole(request, context, request.messages[-1].content)

    async def GenerateStream(self, request: Any, context: Any) -> AsyncIterator[inference_pb2.GenerateChunk]:
        async for chunk in self._pieces(request, context, self._prompt(request)):
            yield chunk

    async def ChatStream(self, request: Any, context: Any) -> AsyncIterator[inference_pb2.GenerateChunk]:
        async for chunk in self._pieces(request, context, request.messages[-1].content):
            yield chunk

    async def Tokenize(self, request: Any, context: Any) -> inference_pb2.TokenizeResponse:
        await self._enter(request, context, "")
        text = request.text or "".join(f"{m.role}:{m.content};" for m in request.chat.messages)
        return inference_pb2.TokenizeResponse(token_ids=text.encode(), max_model_len=4096)

    async def ListModels(self, request: Any, context: Any) -> inference_pb2.ListModelsResponse:
        await self._enter(request, context, "")
        return inference_pb2.ListModelsResponse(models=[inference_pb2.ModelCard(id="tiny", max_model_len=4096)])

    async def Abort(self, request: Any, context: Any) -> inference_pb2.AbortResponse:
        await self._enter(request, context, "")
        return inference_pb2.AbortResponse(found=request.request_id == "r-1")

    async def Explain(self, request: Any, context: Any) -> inference_pb2.ExplainResponse:
        await self._enter(request, context, "")
        documents = {"broken": "{", "list": "[]"}
        given = documents.get(request.request_id, json.dumps({"request_id": request.request_id}))
        return inference_pb2.ExplainResponse(json=given)

    async def Cluster(self, request: Any, context: Any) -> inference_pb2.ClusterResponse:
        await self._enter(request, context, "")
        return inference_pb2.ClusterResponse(json='{"workers": []}')

    # ------------------------------------------------------------ how

    async def _enter(self, request: Any, context: Any, prompt: str) -> None:
        self.seen.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        self.time_left_s.append(context.time_remaining())
        self.attempts += 1
        if self.metadata[-1].get("authorization") == "Bearer wrong":
            await context.abort_with_status(to_rpc_status(Unauthenticated("the API key is wrong")))
        words = prompt.split()
        if words[:1] == ["!error"]:
            error = from_code(words[1], "naïve ☃ text", param="sampling.top_p", retry_after_s=int(words[2]) / 1000)
            await context.abort_with_status(to_rpc_status(error))
        if words[:1] == ["!long"]:
            await context.abort_with_status(to_rpc_status(TwostrokeError("☃" * 100_000, param="x" * 5000)))
        if words[:1] == ["!flaky"] and self.attempts <= int(words[1]):
            await context.abort_with_status(to_rpc_status(from_code("unavailable", "soon", retry_after_s=0.01)))
        if words[:1] == ["!bare"]:
            await context.abort(grpc.StatusCode[words[1]], "no details of ours")
        if words[:1] == ["!busy"]:
            await context.abort_with_status(to_rpc_status(Overloaded("queue is full", retry_after_s=2.5)))
        if words[:1] == ["!hang"]:
            with self._noting_cancellation():
                await asyncio.sleep(60)

    async def _whole(self, request: Any, context: Any, prompt: str) -> inference_pb2.GenerateResponse:
        await self._enter(request, context, prompt)
        num_tokens, choices = request.sampling.max_tokens or 4, range(request.num_choices or 1)
        return inference_pb2.GenerateResponse(
            request_id=request.request_id or "r-1",
            model=request.model or "tiny",
            choices=[
                inference_pb2.Choice(
                    index=choice,
                    text="".join(f"{choice}.{k} " for k in range(num_tokens)),
                    token_ids=[1000 * choice + k for k in range(num_tokens)],
                    finish_reason=common_pb2.FINISH_REASON_LENGTH,
                )
                for choice in choices
            ],
            usage=self._usage(request, num_tokens),
        )

    async def _pieces(self, request: Any, context: Any, prompt: str) -> AsyncIterator[inference_pb2.GenerateChunk]:
        await self._enter(request, context, prompt)
        num_tokens, num_choices = request.sampling.max_tokens or 4, request.num_choices or 1
        names = {"request_id": request.request_id or "r-1", "model": request.model or "tiny"}
        with self._noting_cancellation():
            for k in range(num_tokens):
                if prompt == "!skip" and k == 2:
                    continue
                for choice in range(num_choices):
                    yield inference_pb2.GenerateChunk(
                        **names,
                        choice=choice,
                        text=f"{choice}.{k} ",
                        token_ids=[1000 * choice + k],
                        first_index=1 if prompt == "!repeat" and k == 2 else k,
                    )
                if prompt == "!slow":
                    await asyncio.sleep(0.05)
            if prompt == "!short":
                return
            for choice in range(num_choices):
                yield inference_pb2.GenerateChunk(**names, choice=choice, finish_reason=common_pb2.FINISH_REASON_LENGTH)
            if prompt != "!mute":
                yield inference_pb2.GenerateChunk(**names, usage=self._usage(request, num_tokens))

    @contextlib.contextmanager
    def _noting_cancellation(self) -> Iterator[None]:
        try:
            yield
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.set()
            raise

    @staticmethod
    def _prompt(request: Any) -> str:
        return str(request.text) if request.WhichOneof("prompt") == "text" else ""

    @staticmethod
    def _usage(request: Any, num_tokens: int) -> common_pb2.Usage:
        completion = num_tokens * (request.num_choices or 1)
        return common_pb2.Usage(prompt_tokens=7, completion_tokens=completion, cached_tokens=3)


@contextlib.contextmanager
def serving(
    peer: Peer | None, address: str = "127.0.0.1:0", credentials: grpc.ServerCredentials | None = None
) -> Iterator[int]:
    """The peer on a port of this machine, on a loop in a thread of its own. None: a server without any service."""
    loop = asyncio.new_event_loop()

    async def start() -> tuple[grpc.aio.Server, int]:
        server = grpc.aio.server(options=[("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000)])
        if peer is not None:
            add_InferenceServicer_to_server(peer, server)
        if credentials is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, credentials)
        await server.start()
        return server, port

    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    server, port = asyncio.run_coroutine_threadsafe(start(), loop).result(10)
    try:
        yield port
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(None), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
