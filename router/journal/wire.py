"""Conversion of journaled requests and their pieces to messages and back. Knows no stream, no store."""

from __future__ import annotations

import json
from collections.abc import Iterator

from ...core.errors import InvalidRequest, TwostrokeError
from ...core.request import Allowance, AnswerForm, Request
from ...kv.messages import (
    error_to_wire,
    finish_from_wire,
    finish_to_wire,
    logprobs_from_wire,
    logprobs_to_wire,
    sampling_from_wire,
    sampling_to_wire,
)
from ...protos import common_pb2, peers_pb2
from ..requests.pieces import OutputDelta, TokenUsage
from .journal import Asked

MAX_CHOICES = 128


def asked_to_wire(asked: Asked) -> peers_pb2.JournaledRequest:
    """A request as a message; without the ignored fields, which its client was told when it began."""
    request = asked.request
    return peers_pb2.JournaledRequest(
        request_id=request.request_id,
        model=request.model,
        prompt_ids=request.prompt_ids,
        sampling=sampling_to_wire(request.sampling),
        num_choices=request.num_choices,
        isolation_domain=request.isolation_domain,
        tenant=request.owner,
        timeout_s=request.timeout_s,
        is_chat=request.is_chat,
        is_bounded=request.is_bounded,
        adapter=request.adapter,
        base_model=request.base_model,
        answer=_form_to_wire(request.answer),
        priority=request.priority,
        allowance=_allowance_to_wire(request.allowance),
        face=asked.face,
        body_json=json.dumps(asked.body),
        created_s=asked.created_s,
        key=asked.key,
        fingerprint=asked.fingerprint,
    )


def asked_from_wire(message: peers_pb2.JournaledRequest) -> Asked:
    """A request of a message.

    Raises:
        InvalidRequest: a field is absent or impossible.
    """
    try:
        body = json.loads(message.body_json)
    except ValueError:
        body = None
    is_whole = message.request_id and message.model and message.prompt_ids and message.tenant and message.timeout_s > 0
    if not is_whole or not isinstance(body, dict) or not 1 <= message.num_choices <= MAX_CHOICES:
        raise InvalidRequest("a journaled request has absent or impossible fields")
    request = Request(
        request_id=message.request_id,
        model=message.model,
        prompt_ids=tuple(message.prompt_ids),
        sampling=sampling_from_wire(message.sampling),
        num_choices=message.num_choices,
        isolation_domain=message.isolation_domain,
        timeout_s=message.timeout_s,
        is_chat=message.is_chat,
        is_bounded=message.is_bounded,
        tenant=message.tenant,
        adapter=message.adapter,
        base_model=message.base_model,
        answer=_form_from_wire(message.answer) if message.HasField("answer") else None,
        priority=message.priority,
        allowance=_allowance_from_wire(message.allowance) if message.HasField("allowance") else None,
    )
    return Asked(request, message.face, body, message.created_s, message.key, message.fingerprint)


def _form_to_wire(form: AnswerForm | None) -> peers_pb2.JournaledForm | None:
    if form is None:
        return None
    return peers_pb2.JournaledForm(
        prompt_end=form.prompt_end,
        tools_json=None if form.tools is None else json.dumps(form.tools),
        parallel=form.parallel,
        hides_special_tokens=form.hides_special_tokens,
    )


def _form_from_wire(message: peers_pb2.JournaledForm) -> AnswerForm:
    tools = None
    if message.HasField("tools_json"):
        try:
            tools = json.loads(message.tools_json)
        except ValueError:
            tools = ""
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise InvalidRequest("a journaled request has tools that are no list of objects")
    return AnswerForm(
        message.prompt_end, None if tools is None else tuple(tools), message.parallel, message.hides_special_tokens
    )


def _allowance_to_wire(allowance: Allowance | None) -> peers_pb2.JournaledAllowance | None:
    if allowance is None:
        return None
    return peers_pb2.JournaledAllowance(
        key=allowance.key,
        requests_per_minute=allowance.requests_per_minute,
        tokens_per_minute=allowance.tokens_per_minute,
        share=allowance.share,
    )


def _allowance_from_wire(message: peers_pb2.JournaledAllowance) -> Allowance:
    return Allowance(
        message.key,
        message.requests_per_minute if message.HasField("requests_per_minute") else None,
        message.tokens_per_minute if message.HasField("tokens_per_minute") else None,
        message.share or 1.0,
    )


def piece_to_wire(piece: OutputDelta) -> peers_pb2.JournaledPiece:
    """A piece as a message; without logprobs of the prompt, which no resumable request has."""
    message = peers_pb2.JournaledPiece(
        choice=piece.choice,
        first_index=piece.first_index,
        token_ids=piece.token_ids,
        text=piece.text,
        logprobs=logprobs_to_wire(piece.logprobs),
        num_shown=piece.num_shown,
    )
    if piece.finish_reason is not None:
        message.finish_reason = finish_to_wire(piece.finish_reason)
    if piece.usage is not None:
        usage = piece.usage
        message.usage.CopyFrom(
            common_pb2.Usage(
                prompt_tokens=usage.prompt_tokens,
                completion_tokens=usage.completion_tokens,
                cached_tokens=usage.cached_tokens,
                draft_tokens=usage.draft_tokens,
                accepted_tokens=usage.accepted_tokens,
            )
        )
    return message


def piece_from_wire(message: peers_pb2.JournaledPiece) -> OutputDelta:
    """A piece of a message."""
    usage = message.usage
    return OutputDelta(
        message.choice,
        message.first_index,
        tuple(message.token_ids),
        message.text,
        finish_from_wire(message.finish_reason),
        TokenUsage(
            usage.prompt_tokens,
            usage.completion_tokens,
            usage.cached_tokens,
            usage.draft_tokens,
            usage.accepted_tokens,
        )
        if message.HasField("usage")
        else None,
        logprobs_from_wire(message.logprobs),
        num_shown=message.num_shown,
    )


def items(asked: Asked, pieces: list[OutputDelta], error: TwostrokeError | None) -> Iterator[peers_pb2.JournalItem]:
    """All of a request in messages, in order."""
    yield peers_pb2.JournalItem(request=asked_to_wire(asked))
    for piece in pieces:
        yield peers_pb2.JournalItem(piece=piece_to_wire(piece))
    if error is not None:
        yield peers_pb2.JournalItem(error=error_to_wire(error))
