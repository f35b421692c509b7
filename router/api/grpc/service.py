"""The gRPC API for clients: `twostroke.v1.Inference`. Holds no logic of its own."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import deque
from collections.abc import AsyncIterator
from functools import partial
from typing import Any, TypeAlias

from ....core.errors import RequestNotFound
from ....core.request import FinishReason, Request
from ....kv.messages import logprobs_to_wire
from ....protos import common_pb2, inference_pb2, inference_pb2_grpc
from ...keys.grants import Grant
from ...requests.pieces import OutputDelta, TokenUsage
from ..call import GenerateCall
from ..frontend import Frontend
from ..output import ChoiceOutput, GivenCall, ParsedDelta
from ..running.resumable import Terms
from ..running.started import Started
from .call_wire import Reader, Said, chat_call, generate_call, tokenize_call
from .guard import api_key

_REASONS = {
    None: common_pb2.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: common_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: common_pb2.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: common_pb2.FINISH_REASON_CANCELLED,
    FinishReason.ERROR: common_pb2.FINISH_REASON_ERROR,
    FinishReason.TOOL_CALLS: common_pb2.FINISH_REASON_TOOL_CALLS,
}


Context: TypeAlias = Any  # a GuardedContext


class InferenceService(inference_pb2_grpc.InferenceServicer):
    """One per router, behind a `Guard`, which checks keys and bounds and turns errors into statuses.

    A message is released as soon as it is read, because it may be large and a stream runs long.
    """

    def __init__(self, front: Frontend) -> None:
        self._front = front

    def Generate(self, request: inference_pb2.GenerateRequest, context: Context) -> Any:
        """Answer a completion in one reply."""
        return self._whole(generate_call, request, context)

    def Chat(self, request: inference_pb2.ChatRequest, context: Context) -> Any:
        """Answer a chat in one reply."""
        return self._whole(chat_call, request, context)

    def GenerateStream(
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[inference_pb2.GenerateChunk]:
        """Stream a completion."""
        return self._chunks(generate_call, request, context)

    def ChatStream(
        self, request: inference_pb2.ChatRequest, context: Context
    ) -> AsyncIterator[inference_pb2.GenerateChunk]:
        """Stream the answer to a chat."""
        return self._chunks(chat_call, request, context)

    async def Resume(
        self, request: inference_pb2.ResumeRequest, context: Context
    ) -> AsyncIterator[inference_pb2.GenerateChunk]:
        """Go on with a resumable stream after a cursor."""
        tenant = self._tenant(context)
        started = await self._front.resumables.resume(tenant, request.request_id, request.cursor)
        async for chunk in self._told(started, context):
            yield chunk

    async def Tokenize(self, request: inference_pb2.TokenizeRequest, context: Context) -> Any:
        """Token ids of a prompt or a chat."""
        call = await self._read(tokenize_call, request, context)
        admitted, model = await self._front.admit(call)
        await _tell_ignored(admitted, context)
        return inference_pb2.TokenizeResponse(token_ids=admitted.prompt_ids, max_model_len=model.max_model_len)

    async def ListModels(self, request: inference_pb2.ListModelsRequest, context: Context) -> Any:
        """List the served models."""
        allowed = self._grant(context).models
        cards = [
            inference_pb2.ModelCard(id=name, max_model_len=self._front.models.facts(name).max_model_len)
            for name in self._front.models.names()
            if not allowed or name in allowed
        ]
        return inference_pb2.ListModelsResponse(models=cards)

    async def Abort(self, request: inference_pb2.AbortRequest, context: Context) -> Any:
        """Cancel a running request."""
        found = await self._front.abort(request.request_id, self._tenant(context))
        return inference_pb2.AbortResponse(found=found)

    async def Explain(self, request: inference_pb2.ExplainRequest, context: Context) -> Any:
        """Report about a request: its workers, reasons and times."""
        explained = await self._front.explain(request.request_id, self._tenant(context))
        if explained is None:
            raise RequestNotFound(
                f"no request {request.request_id[:128]!r} is known here (any more)", param="request_id"
            )
        return inference_pb2.ExplainResponse(json=json.dumps(explained))

    async def Cluster(self, request: inference_pb2.ClusterRequest, context: Context) -> Any:
        """Report about the router and its workers."""
        self._grant(context).check_monitor()
        return inference_pb2.ClusterResponse(json=json.dumps(await self._front.cluster()))

    # -------------------------------------------------------------- inside

    def _tenant(self, context: Context) -> str:
        return self._grant(context).tenant

    def _grant(self, context: Context) -> Grant:
        return self._front.grant_of(api_key(context.invocation_metadata()))

    async def _read(self, read: Reader, message: Any, context: Context) -> GenerateCall:
        """Convert a message to a call; long ones outside the event loop."""
        key, left_s = api_key(context.invocation_metadata()), context.time_remaining()
        said = Said(message, key, left_s, self._front.models)
        call: GenerateCall = await context.bench.run(message.ByteSize(), partial(read, said))
        return call

    async def _start(self, read: Reader, message: Any, context: Context) -> Started:
        if message.resumable or message.idempotency_key:
            sent = message.SerializeToString(deterministic=True)
            fingerprint = hashlib.blake2b(sent, digest_size=16, person=b"twostroke-grpc").digest()
            terms = Terms("grpc", {}, message.idempotency_key, fingerprint)
            call = await self._read(read, message, context)
            return await self._front.resumables.start(call, terms, context.admitted)
        return await self._front.start(await self._read(read, message, context), context.admitted)

    async def _whole(self, read: Reader, message: Any, context: Context) -> inference_pb2.GenerateResponse:
        started = await self._start(read, message, context)
        del message  # frees its memory while the request runs
        request = started.request
        choices = [inference_pb2.Choice(index=index) for index in range(request.num_choices)]
        outputs = _outputs(started)
        usage: TokenUsage | None = None
        prompt_logprobs: list[common_pb2.TokenLogprobs] = []
        async with contextlib.aclosing(started.pieces()) as pieces:
            await _tell_ignored(request, context)
            async for piece in pieces:
                choice, parsed, reason = choices[piece.choice], *_parsed(piece, outputs)
                choice.text += parsed.content
                choice.reasoning += parsed.reasoning
                choice.tool_calls.extend(map(_call, parsed.calls))
                choice.token_ids.extend(piece.token_ids)
                choice.finish_reason = _REASONS[reason]
                choice.logprobs.extend(logprobs_to_wire(piece.logprobs))
                prompt_logprobs += piece.prompt_scores
                usage = piece.usage or usage
        return inference_pb2.GenerateResponse(
            request_id=request.request_id,
            model=request.model,
            choices=choices,
            usage=_usage(usage, outputs),
            prompt_logprobs=prompt_logprobs,
        )

    async def _chunks(self, read: Reader, message: Any, context: Context) -> AsyncIterator[inference_pb2.GenerateChunk]:
        started = await self._start(read, message, context)
        del message
        async for chunk in self._told(started, context):
            yield chunk

    async def _told(self, started: Started, context: Context) -> AsyncIterator[inference_pb2.GenerateChunk]:
        """The chunks of a stream, those that its client lacks."""
        track, outputs = started.track, _outputs(started)
        held: deque[inference_pb2.GenerateChunk] = deque()
        async with contextlib.aclosing(started.pieces()) as pieces:
            await _tell_ignored(started.request, context)
            async for piece in pieces:
                if track is None:
                    yield _chunk_with_scores(piece, started, outputs)
                    continue
                for part in track.parts(piece):
                    is_new = track.take(part)
                    chunk = _chunk_with_scores(part, started, outputs)  # also what the client has: the parsers read on
                    if is_new:
                        chunk.cursor = track.cursor
                        held.append(chunk)
                while held and track.is_confirmed:
                    yield held.popleft()


# ------------------------------------------------------------------ conversions


def _chunk_with_scores(
    piece: OutputDelta, started: Started, outputs: list[ChoiceOutput]
) -> inference_pb2.GenerateChunk:
    chunk = _chunk(piece, started.request, outputs)
    chunk.prompt_logprobs.extend(piece.prompt_scores)
    return chunk


def _outputs(started: Started) -> list[ChoiceOutput]:
    """Parsers of the choices; empty if the answer is its text."""
    request = started.request
    choices = range(request.num_choices if request.answer is not None else 0)
    return [ChoiceOutput(request, choice, started.model) for choice in choices]


def _parsed(piece: OutputDelta, outputs: list[ChoiceOutput]) -> tuple[ParsedDelta, FinishReason | None]:
    """What a piece adds to its choice, and the choice's finish reason for clients."""
    if not outputs:
        return ParsedDelta(piece.text), piece.finish_reason
    output = outputs[piece.choice]
    return output.take(piece), output.reason(piece.finish_reason)


def _call(call: GivenCall) -> inference_pb2.ToolCall:
    return inference_pb2.ToolCall(id=call.id, name=call.name, arguments=call.arguments)


def _chunk(piece: OutputDelta, request: Request, outputs: list[ChoiceOutput]) -> inference_pb2.GenerateChunk:
    parsed, reason = _parsed(piece, outputs)
    return inference_pb2.GenerateChunk(
        request_id=request.request_id,
        model=request.model,
        choice=piece.choice,
        text=parsed.content,
        reasoning=parsed.reasoning,
        tool_calls=map(_call, parsed.calls),
        token_ids=piece.token_ids,
        first_index=piece.first_index,
        finish_reason=_REASONS[reason],
        usage=_usage(piece.usage, outputs),
        logprobs=logprobs_to_wire(piece.logprobs),
    )


def _usage(usage: TokenUsage | None, outputs: list[ChoiceOutput]) -> common_pb2.Usage | None:
    if usage is None:
        return None
    return common_pb2.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
        draft_tokens=usage.draft_tokens,
        accepted_tokens=usage.accepted_tokens,
        reasoning_tokens=sum(output.reasoning_tokens for output in outputs),
    )


async def _tell_ignored(request: Request, context: Context) -> None:
    """Send the names of ignored fields as initial metadata, as the HTTP API does in a header."""
    if request.ignored_fields:
        await context.send_initial_metadata((("x-twostroke-ignored", ", ".join(request.ignored_fields)),))
