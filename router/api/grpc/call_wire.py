"""Conversion of gRPC messages to calls: fields by their API names; lists are counted before they are copied."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

from ....core.errors import ContextLengthExceeded, DeadlineExceeded, InvalidRequest
from ....core.sampling import FIELDS, Form, SamplingOptions
from ....kv.messages import grammar_from_wire
from ....protos import common_pb2, inference_pb2
from ....text.grammar_program import PARAM
from ..call import GenerateCall
from ..models import ModelDirectory
from .chat_wire import chat_messages, template_options

_USUAL_COMPLETION = 256  # tokens of a completion that asks for none: no template makes it end
_ON_WIRE = common_pb2.SamplingParams.DESCRIPTOR.fields_by_name
_OPTIONAL = tuple(field.api for field in FIELDS if _ON_WIRE[field.api].has_presence)
_OTHERS = tuple(  # (name, what a value becomes): empty or false is nothing said
    (field.api, tuple if field.is_list else dict if field.form is Form.BIASES else bool)
    for field in FIELDS
    if not _ON_WIRE[field.api].has_presence
)
_OF_ROUTERS = tuple((field.wire, field.api) for field in FIELDS if field.wire != field.api)


@dataclass(frozen=True, slots=True)
class Said:
    """A message with its key and deadline."""

    message: Any
    api_key: str | None
    left_s: float | None  # until the client's deadline; None: it has no deadline
    models: ModelDirectory


Reader: TypeAlias = Callable[[Said], GenerateCall]


def generate_call(said: Said) -> GenerateCall:
    """Call of a completion.

    Raises:
        InvalidRequest: there is no prompt, or a field has an invalid value.
        ContextLengthExceeded: the prompt has too many tokens for its model.
        ModelNotFound, Unavailable: no worker serves that model.
        DeadlineExceeded: the client's deadline is over.
    """
    message: inference_pb2.GenerateRequest = said.message
    which = message.WhichOneof("prompt")
    if which is None:
        raise InvalidRequest("prompt is missing; give text or token_ids", param="prompt")
    prompt = message.text if which == "text" else _token_ids(said)
    suffix = message.suffix or None
    return GenerateCall(prompt=prompt, suffix=suffix, usual_max_tokens=_USUAL_COMPLETION, **_common(said))


def chat_call(said: Said) -> GenerateCall:
    """Call of a chat. Raises the errors of `generate_call`."""
    message: inference_pb2.ChatRequest = said.message
    return GenerateCall(messages=chat_messages(message.messages), **template_options(message.options), **_common(said))


def tokenize_call(said: Said) -> GenerateCall:
    """Call of a tokenisation, as a request for one token. Raises the errors of `generate_call`."""
    message: inference_pb2.TokenizeRequest = said.message
    which = message.WhichOneof("input")
    if which is None:
        raise InvalidRequest("input is missing; give text or chat", param="input")
    return GenerateCall(
        model=message.model or None,
        prompt=message.text if which == "text" else None,
        messages=chat_messages(message.chat.messages) if which == "chat" else None,
        **template_options(message.chat.options),
        sampling={"max_tokens": 1},
        api_key=said.api_key,
        timeout_s=checked_left_s(said.left_s),
    )


def _token_ids(said: Said) -> list[int]:
    ids = said.message.token_ids.ids
    most = said.models.facts(said.message.model).max_model_len
    if len(ids) >= most:
        raise ContextLengthExceeded(
            f"prompt has {len(ids)} tokens; the model's context is {most}: shorten it", param="prompt"
        )
    return list(ids)


def _common(said: Said) -> dict[str, Any]:
    message = said.message
    return {
        "model": message.model or None,
        "n": message.num_choices or None,
        "sampling": _sampling(message.sampling),
        "priority": message.priority if message.HasField("priority") else None,
        "request_id": message.request_id or None,
        "api_key": said.api_key,
        "timeout_s": checked_left_s(said.left_s),
    }


def _sampling(message: common_pb2.SamplingParams) -> SamplingOptions:
    for wire, api in _OF_ROUTERS:
        if getattr(message, wire):
            raise InvalidRequest(f"{wire} are the router's to make; give {api}", param=wire)
    has: Callable[[Any], bool] = message.HasField
    found: dict[str, Any] = {name: getattr(message, name) for name in _OPTIONAL if has(name)}
    if has(PARAM):
        grammar = grammar_from_wire(message.structured_outputs)
        found[PARAM] = {} if grammar is None else {grammar.kind: grammar.source}
    found |= {name: copied(value) for name, copied in _OTHERS if (value := getattr(message, name))}
    return cast(SamplingOptions, found)


def checked_left_s(left_s: float | None) -> float | None:
    """The time until a client's deadline; None: it has none.

    Raises:
        DeadlineExceeded: the deadline is over.
    """
    if left_s is not None and left_s <= 0:
        raise DeadlineExceeded("the client's deadline was over when its call was read")
    return left_s
