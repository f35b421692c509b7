"""Body of POST /v1/responses: its fields, and the chat that it asks for. Knows no HTTP and no model.

Fields are served, accepted without effect, refused by name, or unknown, by the rules of router/api/fields.py.
Source of the fields: OpenAI's API reference of Responses, and the types of its Python client.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from .....core.errors import InvalidRequest, TwostrokeError
from ...checks import short, text_of
from ...fields import ChatBody, Known, Whole
from ...ignored import Ignored
from ...messages import MAX_MESSAGES
from ...openai_requests import checked, parse
from ...tools import MAX_TOOLS
from .items import Item, check_number, items_of, messages_of
from .tools import Offer, check_text, format_of, offer_of

MAX_METADATA, MAX_KEY_CHARS, MAX_VALUE_CHARS = 16, 64, 512  # OpenAI's bounds
MAX_NAME_CHARS = 512  # of users, cache keys, tiers
MAX_INCLUDES = 32

ACCEPTED = frozenset(
    {
        *("prompt_cache_retention", "prompt_cache_options", "max_tool_calls", "client_metadata", "access_programs"),
        *("background_options", "image"),
    }
)
REFUSED: dict[str, tuple[Any, ...]] = {
    "conversation": (),  # previous_response_id is served
    "prompt": (),  # a template that OpenAI keeps
    "context_management": ([],),
    "moderation": (),
    # Fields of chats; here they have other names.
    "messages": ([],),
    "max_tokens": (),
    "max_completion_tokens": (),
    "response_format": ({"type": "text"},),
    "reasoning_effort": (),
    "n": (1,),
}
INSTEAD = {
    "conversation": "give previous_response_id",
    "messages": "it belongs to /v1/chat/completions: give input",
    "max_tokens": "give max_output_tokens",
    "max_completion_tokens": "give max_output_tokens",
    "response_format": "give text.format",
    "reasoning_effort": "give reasoning.effort",
    "n": "a response has one answer: send it several times",
}
# Fields of chats that OpenAI's Responses lack, as vLLM and others have them here too.
_OF_CHATS = (
    *("temperature", "top_p", "top_k", "min_p", "seed", "stop", "presence_penalty", "frequency_penalty"),
    *("repetition_penalty", "min_tokens", "ignore_eos", "cache_salt", "priority", "chat_template_kwargs"),
)
LOGPROBS = "message.output_text.logprobs"
# Parts of an answer that built-in tools make, which are not served; and the reasoning, which is given anyway.
_INCLUDED_OF_NOTHING = (
    *("reasoning.encrypted_content", "web_search_call.results", "web_search_call.action.sources"),
    *("file_search_call.results", "code_interpreter_call.outputs", "computer_call_output.output.image_url"),
    "message.input_image.image_url",
)
_SUMMARIES = ("auto", "concise", "detailed")

# Their names of fields that the validator knows by those of chats.
THEIR_NAMES = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}


class ResponsesBody(Known):
    """Body of POST /v1/responses."""

    model: str | None = None
    input: Any = ""  # a text or a list of items; checked by `_check_input` and items.py
    instructions: str | None = None
    max_output_tokens: Annotated[Whole, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = Field(None, max_length=MAX_TOOLS, fail_fast=True)
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    include: list[str] | None = Field(None, max_length=MAX_INCLUDES, fail_fast=True)
    top_logprobs: Whole | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    background: bool | None = None
    previous_response_id: str | None = None
    truncation: str | None = None
    user: str | None = Field(None, max_length=MAX_NAME_CHARS)
    prompt_cache_key: str | None = Field(None, max_length=MAX_NAME_CHARS)
    safety_identifier: str | None = Field(None, max_length=MAX_NAME_CHARS)
    service_tier: str | None = Field(None, max_length=MAX_NAME_CHARS)
    temperature: float | None = None
    top_p: float | None = None
    top_k: Whole | None = None
    min_p: float | None = None
    seed: Whole | None = None
    stop: Any = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    min_tokens: Whole | None = None
    ignore_eos: bool | None = None
    cache_salt: str | None = None
    priority: Whole | None = None
    chat_template_kwargs: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Wanted:
    """A checked body."""

    body: ResponsesBody
    offer: Offer
    summary: str | None  # the kind of summary of the reasoning that it asks for
    logprobs: bool

    @property
    def is_stored(self) -> bool:
        """Whether the response can be asked for later."""
        return self.body.store is not False

    def items(self) -> tuple[list[Item], list[str]]:
        """The items of its input, with the names of their fields without effect. Raises the errors of `items_of`."""
        ignored = Ignored()
        found = items_of(self.body.input, ignored)
        return found, list(ignored.names())

    def said(self) -> dict[str, Any]:
        """The fields that the response repeats, without those that the request decides."""
        body, text, reasoning = self.body, self.body.text or {}, self.body.reasoning or {}
        return {
            "background": bool(body.background),
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": None,
            "metadata": body.metadata or {},
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "prompt_cache_key": body.prompt_cache_key,
            "reasoning": {"effort": reasoning.get("effort"), "summary": self.summary},
            "safety_identifier": body.safety_identifier,
            "service_tier": "default",
            "store": self.is_stored,
            "text": {"format": text.get("format") or {"type": "text"}, "verbosity": text.get("verbosity") or "medium"},
            "tool_choice": self.offer.choice_said,
            "tools": self.offer.tools_said,
            "top_logprobs": body.top_logprobs or 0,
            "truncation": "disabled",
            "user": body.user,
        }

    def chat(self, items: Sequence[Item]) -> ChatBody:
        """The chat of a whole conversation. Raises the errors of `parse`, with the names of chats."""
        body = self.body
        reasoning = body.reasoning or {}
        messages = messages_of(items, body.instructions)
        if len(messages) > MAX_MESSAGES:
            raise InvalidRequest(
                f"input: the conversation has {len(messages)} messages; at most {MAX_MESSAGES}", param="input"
            )
        chat: dict[str, Any] = {
            "model": body.model,
            "messages": messages,
            "max_tokens": body.max_output_tokens,
            "stream": body.stream,
            "tools": self.offer.tools or None,
            "tool_choice": self.offer.choice,
            "parallel_tool_calls": body.parallel_tool_calls,
            "reasoning_effort": reasoning.get("effort"),
            "response_format": format_of(body.text),
            "logprobs": True if self.logprobs else None,
            "top_logprobs": body.top_logprobs if self.logprobs else None,
            **{name: getattr(body, name) for name in _OF_CHATS},
        }
        return parse(chat, ChatBody)[0]


def wanted_of(values: dict[str, Any], *, strict: bool) -> tuple[Wanted, list[str]]:
    """Check a body but for its items; returns it with the names of its fields without effect.

    Raises:
        InvalidRequest: a field has a wrong form; with `strict` also an unknown field.
        UnsupportedParameter: a field or a tool that is not served.
    """
    body, unknown = checked(values, ResponsesBody, ACCEPTED, REFUSED, strict=strict, instead=INSTEAD)
    ignored = Ignored()
    _check_metadata(body.metadata)
    if body.background and body.store is False:
        raise InvalidRequest("background is true and store is false; a response is kept for who asks later: leave "
                             "store out", param="background")  # fmt: skip
    _check_input(body)
    _check_truncation(body.truncation, ignored)
    check_include(body.include or ())
    logprobs = LOGPROBS in (body.include or ())
    if body.instructions is not None:
        text_of("instructions", body.instructions)
    if body.top_logprobs and not logprobs:
        logprobs = True  # OpenAI's newer servers need no include beside it
    check_text(body.text or {}, ignored)  # its errors come before any other work
    wanted = Wanted(body, offer_of(body, ignored), _summary(body, ignored), logprobs)
    return wanted, [*unknown, *ignored.names()]


def in_their_words(error: TwostrokeError) -> TwostrokeError:
    """An error of the validator with the names of this API, where its field has another one in chats."""
    ours = error.param or ""
    if ours.startswith("messages["):  # of the whole conversation, so its number is not that of an item
        return type(error)(f"input: {error.message}", param="input", retry_after_s=error.retry_after_s)
    theirs = ours.replace(".function", "", 1) if ours.startswith("tools[") else THEIR_NAMES.get(ours, ours)
    if theirs == ours:
        return error
    message = theirs + error.message.removeprefix(ours) if error.message.startswith(ours) else error.message
    return type(error)(message, param=theirs, retry_after_s=error.retry_after_s)


def _check_input(body: ResponsesBody) -> None:
    if not isinstance(body.input, (str, list)):
        raise InvalidRequest(f"input is {short(body.input)}; must be a text or a list of items", param="input")
    if not body.input and body.previous_response_id is None:
        raise InvalidRequest("input is empty; give a text or at least one item", param="input")
    if isinstance(body.input, list):
        check_number(len(body.input), "input")


def _check_metadata(metadata: dict[str, Any] | None) -> None:
    if metadata is None:
        return
    if len(metadata) > MAX_METADATA:
        raise InvalidRequest(f"metadata has {len(metadata)} entries; at most {MAX_METADATA}", param="metadata")
    for key, value in metadata.items():
        if len(key) > MAX_KEY_CHARS or not isinstance(value, str) or len(value) > MAX_VALUE_CHARS:
            raise InvalidRequest(
                f"metadata has the entry {short(key)}: {short(value)}; keys have at most {MAX_KEY_CHARS} characters, "
                f"and values are strings of at most {MAX_VALUE_CHARS}",
                param="metadata",
            )


def _check_truncation(truncation: str | None, ignored: Ignored) -> None:
    if truncation not in (None, "auto", "disabled"):
        raise InvalidRequest(f"truncation is {short(truncation)}; must be auto or disabled", param="truncation")
    if truncation == "auto":
        ignored.add("truncation")  # what exceeds the context is refused, never shortened


def check_include(include: Sequence[str]) -> None:
    """Check what parts of an answer are asked for.

    Raises:
        InvalidRequest: one that the API does not have.
    """
    for place, name in enumerate(include):
        if name != LOGPROBS and name not in _INCLUDED_OF_NOTHING:
            known = ", ".join((LOGPROBS, *_INCLUDED_OF_NOTHING))
            raise InvalidRequest(
                f"include[{place}] is {short(name)}; must be one of {known}", param=f"include[{place}]"
            )


def _summary(body: ResponsesBody, ignored: Ignored) -> str | None:
    found: str | None = None
    for name, value in (body.reasoning or {}).items():
        if value is None:
            continue
        if name in ("summary", "generate_summary"):
            if value not in _SUMMARIES:
                raise InvalidRequest(
                    f"reasoning.{name} is {short(value)}; must be one of {', '.join(_SUMMARIES)}",
                    param=f"reasoning.{name}",
                )
            found = value
        elif name == "effort":
            if not isinstance(value, str):
                raise InvalidRequest(f"reasoning.effort is {short(value)}; must be a string", param="reasoning.effort")
        else:
            ignored.add("reasoning", name)
    return found
