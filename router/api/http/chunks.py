"""Answers of the completion APIs as they leave: one object, or server-sent events, with ids if they can be resumed."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator
from concurrent.futures import Executor
from typing import Any

from ....core.errors import InternalError, TwostrokeError
from ...api import openai_requests as openai
from ...requests.pieces import OutputDelta
from ..echo import Echo, echo_of
from ..fields import Body, ChatBody, CompletionBody
from ..openai_responses import Answer, Wants, error_body
from ..running.started import Started
from .sse import event, to_json_in_parts

log = logging.getLogger(__name__)

EVENT_ID_PARTS = ":"  # between request id and cursor, which has none
USAGE_MARK = ".u"  # behind the cursor of the event with the usage


def wants_usage(body: Body) -> bool:
    """Return whether a stream ends with an event of the request's usage."""
    return bool(body.stream_options and body.stream_options.include_usage)


def answer_to(body: Body, head: dict[str, Any], started: Started) -> Answer:
    """The answer to a body whose request has begun. `head`: the fields of each object or event; completed here.

    With `echo` it computes token offsets, which takes long for long prompts.
    """
    if body.stream:
        head["object"] = "chat.completion.chunk" if started.request.is_chat else head["object"]
        head |= {"usage": None} if wants_usage(body) else {}
    return Answer(head, started.requests, started.model, _wants(body, started))


def _wants(body: Body, started: Started) -> Wants:
    echo: tuple[Echo, ...] | None = None
    options = body.stream_options
    if isinstance(body, CompletionBody) and body.echo:
        prompts, tokenizer = openai.prompts_of(body, len(started.requests)), started.model.tokenizer
        pairs = zip(prompts, started.requests, strict=True)
        echo = tuple(echo_of(prompt, request, tokenizer) for prompt, request in pairs)
    return Wants(
        logprobs=started.request.sampling.logprobs,
        prompt_logprobs=body.sampling_options().get("prompt_logprobs"),
        echo=echo,
        token_ids=bool(body.return_token_ids),
        tokens_as_ids=bool(body.return_tokens_as_token_ids),
        usage_so_far=bool(options and options.include_usage and options.continuous_usage_stats),
        prompt_only=openai.is_scored_only(body),
        reasoning=not isinstance(body, ChatBody) or body.include_reasoning is not False,
    )


async def whole(started: Started, answer: Answer, scores: Executor) -> dict[str, Any] | bytes:
    """Collect all pieces in one response object; with prompt scores, which may be many, its JSON bytes."""
    pieces = started.pieces()
    try:
        async for piece in pieces:
            answer.add(piece)
    finally:
        await pieces.aclose()
    if not answer.has_scores:
        return answer.whole()
    return await asyncio.get_running_loop().run_in_executor(scores, lambda: to_json_in_parts(answer.whole()))


async def chunks_of(
    started: Started, answer: Answer, scores: Executor, *, with_usage: bool
) -> AsyncGenerator[bytes, None]:
    """Yield the server-sent events of a stream, those that its client lacks. Of a resumable one they have ids."""
    track, name = started.track, answer.head["id"]
    held: deque[bytes] = deque()
    pieces: AsyncGenerator[OutputDelta, None] = started.pieces()
    try:
        async for piece in pieces:
            if track is not None:
                for part in track.parts(piece):
                    is_new, chunk = track.take(part), answer.chunk(part)
                    if is_new:
                        held.append(event(chunk, f"{name}{EVENT_ID_PARTS}{track.cursor}"))
                while held and track.is_confirmed:
                    yield held.popleft()
            elif piece.prompt_scores:
                chunks = asyncio.get_running_loop().run_in_executor(scores, _scored_chunks, answer, piece)
                yield await chunks
            else:
                for chunk in answer.chunks(piece):
                    yield event(chunk)
        last = answer.last_chunk()
        if with_usage and last is not None:
            yield event(last, f"{name}{EVENT_ID_PARTS}{track.cursor}{USAGE_MARK}" if track is not None else None)
        yield b"data: [DONE]\n\n"
    finally:
        await pieces.aclose()


async def first_of(chunks: AsyncGenerator[bytes, None]) -> bytes:
    """The first event; an error before it is raised here."""
    return await anext(chunks)


async def events_of(
    chunks: AsyncGenerator[bytes, None], first: bytes | None, answer: Answer
) -> AsyncGenerator[bytes, None]:
    """Yield the events of a stream; an error in it becomes its last event."""
    try:
        if first is not None:
            yield first
        async for chunk in chunks:
            yield chunk
    except TwostrokeError as error:
        yield event(error_body(error))
    except Exception:
        log.exception("request %s failed within its stream", answer.head["id"])
        yield event(error_body(InternalError("the request failed; the router's log has more")))
    finally:
        await chunks.aclose()


def _scored_chunks(answer: Answer, piece: OutputDelta) -> bytes:
    return b"".join(b"data: %s\n\n" % to_json_in_parts(chunk) for chunk in answer.chunks(piece))
