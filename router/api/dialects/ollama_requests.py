"""Conversion of Ollama's bodies to OpenAI chats and completions. Knows no HTTP and no model.

Fields and options are served, accepted without effect, refused, or unknown, by the rules of router/api/fields.py.
Source of the fields: Ollama's API reference, and the types of its Python client.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import Field

from ....core.errors import InvalidRequest, UnsupportedParameter
from ..checks import short
from ..fields import ChatBody, CompletionBody, Known
from ..ignored import Ignored
from ..messages import MAX_MESSAGES
from ..openai_requests import checked, parse
from ..tools import MAX_TOOLS

ACCEPTED = frozenset({"keep_alive", "truncate", "shift"})
_NO_SCORES: dict[str, tuple[Any, ...]] = {"logprobs": (False,), "top_logprobs": (0,)}
REFUSED_OF_CHATS: dict[str, tuple[Any, ...]] = {**_NO_SCORES}
REFUSED_OF_GENERATE: dict[str, tuple[Any, ...]] = {
    **_NO_SCORES,
    "images": ([],),
    "template": ("",),
    "context": ([],),
}

# Options by their names here.
OPTIONS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "seed": "seed",
    "stop": "stop",
    "num_predict": "max_tokens",
    "repeat_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
}
QUIET_OPTIONS = frozenset(  # of loading a model, and settings of samplers that are refused when they are switched on
    {
        *("numa", "num_batch", "num_gpu", "main_gpu", "low_vram", "f16_kv", "vocab_only", "use_mmap", "use_mlock"),
        *("num_thread", "num_keep", "repeat_last_n", "mirostat_tau", "mirostat_eta", "penalize_newline"),
    }
)
REFUSED_OPTIONS: dict[str, tuple[Any, ...]] = {
    "mirostat": (0,),
    "tfs_z": (1,),
    "typical_p": (1,),
    "embedding_only": (False,),
    "logits_all": (False,),
}
_EFFORTS = ("low", "medium", "high")
_UNTIL_FULL = -1  # max_tokens where num_predict is -1, -2 or not given


class _Shared(Known):
    model: str
    options: dict[str, Any] | None = None
    format: str | dict[str, Any] | None = None
    stream: bool | None = None
    think: bool | str | None = None


class OllamaChat(_Shared):
    """Body of POST /api/chat."""

    messages: list[dict[str, Any]] | None = Field(None, max_length=MAX_MESSAGES, fail_fast=True)
    tools: list[dict[str, Any]] | None = Field(None, max_length=MAX_TOOLS, fail_fast=True)


class OllamaGenerate(_Shared):
    """Body of POST /api/generate."""

    prompt: str | None = None
    suffix: str | None = None
    system: str | None = None
    raw: bool | None = None


class ShowBody(Known):
    """Body of POST /api/show."""

    model: str | None = None
    name: str | None = None  # its older name
    verbose: bool | None = None


class Asked(NamedTuple):
    """A body of Ollama's. With neither chat nor completion it only asks for the model to be loaded."""

    model: str
    chat: ChatBody | None
    completion: CompletionBody | None  # the same prompt without a template, where both are given
    is_streamed: bool
    shows_thinking: bool


def asked_of_chat(values: dict[str, Any], *, strict: bool) -> tuple[Asked, list[str]]:
    """What a body of /api/chat asks for, with the names of its fields without effect.

    Raises:
        InvalidRequest: a field has a wrong form; with `strict` also an unknown field.
        UnsupportedParameter: a field or an option that is not served.
    """
    body, unknown = checked(values, OllamaChat, ACCEPTED, REFUSED_OF_CHATS, strict=strict)
    ignored = Ignored()
    chat: ChatBody | None = None
    if body.messages:
        fields = {**_common(body, ignored), **_thinking(body.think), "tools": body.tools}
        chat, _ = parse({**fields, "messages": [*_messages(body.messages)]}, ChatBody)
    return _asked(body, chat, None), [*unknown, *ignored.names()]


def asked_of_generate(values: dict[str, Any], *, strict: bool) -> tuple[Asked, list[str]]:
    """The same of /api/generate."""
    body, unknown = checked(values, OllamaGenerate, ACCEPTED, REFUSED_OF_GENERATE, strict=strict)
    ignored = Ignored()
    chat: ChatBody | None = None
    completion: CompletionBody | None = None
    if body.prompt or body.suffix:
        common = _common(body, ignored)
        if not body.raw and not body.suffix:
            system = [{"role": "system", "content": body.system}] if body.system else []
            messages = [*system, {"role": "user", "content": body.prompt}]
            chat, _ = parse({**common, **_thinking(body.think), "messages": messages}, ChatBody)
        elif body.system:
            raise InvalidRequest("system is given with raw or suffix, where no template reads it", param="system")
        if chat is None or not body.system:
            completion, _ = parse({**common, "prompt": body.prompt or "", "suffix": body.suffix}, CompletionBody)
    return _asked(body, chat, completion), [*unknown, *ignored.names()]


def _asked(body: _Shared, chat: ChatBody | None, completion: CompletionBody | None) -> Asked:
    return Asked(body.model, chat, completion, body.stream is not False, body.think is not False)


def _messages(messages: Sequence[Mapping[str, Any]]) -> Sequence[dict[str, Any]]:
    """Messages with OpenAI's names of their fields. Calls have no ids here: results follow them by name and order."""
    found: list[dict[str, Any]] = []
    open_calls: list[tuple[Any, str]] = []  # (name, id) of calls without a result
    for place, message in enumerate(messages):
        if message.get("images"):
            where = f"messages[{place}].images"
            raise UnsupportedParameter(f"{where} is not served; only text is: leave it out", param=where)
        said = {name: value for name, value in message.items() if name not in ("images", "tool_name")}
        said.setdefault("content", "")
        calls = said.get("tool_calls")
        if isinstance(calls, list) and all(isinstance(call, Mapping) for call in calls):
            said["tool_calls"] = [{"id": f"call{len(found):03}{index:02}", **call} for index, call in enumerate(calls)]
            open_calls = [(_name_of(call), call["id"]) for call in said["tool_calls"]]
        if said.get("role") == "tool" and "tool_call_id" not in said and open_calls:
            name = message.get("tool_name")
            answered = next((call for call in open_calls if call[0] == name), open_calls[0])
            open_calls.remove(answered)
            said["tool_call_id"] = answered[1]
        found.append(said)
    return found


def _name_of(call: Mapping[str, Any]) -> Any:
    function = call.get("function")
    return function.get("name") if isinstance(function, Mapping) else None


def _common(body: _Shared, ignored: Ignored) -> dict[str, Any]:
    found: dict[str, Any] = {"model": body.model, "max_tokens": _UNTIL_FULL}
    for name, value in (body.options or {}).items():
        if value is None:
            continue
        if name in OPTIONS:
            found[OPTIONS[name]] = value
        elif name in REFUSED_OPTIONS:
            if value not in REFUSED_OPTIONS[name]:
                where = f"options.{name}"
                raise UnsupportedParameter(f"{where} is not served; leave it out", param=where)
        elif name not in QUIET_OPTIONS:
            ignored.add("options", name)  # among them num_ctx: the context is the served model's
    if found["max_tokens"] == -2:
        found["max_tokens"] = _UNTIL_FULL
    return found | _format(body.format)


def _format(given: str | dict[str, Any] | None) -> dict[str, Any]:
    if given in (None, "", {}):
        return {}
    if isinstance(given, dict):
        json_schema = {"name": "output", "schema": given}
        return {"response_format": {"type": "json_schema", "json_schema": json_schema}}
    if given != "json":
        raise InvalidRequest(f"format is {short(given)}; must be json or a JSON schema", param="format")
    return {"response_format": {"type": "json_object"}}


def _thinking(think: bool | str | None) -> dict[str, Any]:
    if think is None or think == "":
        return {}
    if isinstance(think, bool):
        return {"chat_template_kwargs": {"enable_thinking": think}}
    if think not in _EFFORTS:
        raise InvalidRequest(
            f"think is {short(think)}; must be true, false or one of {', '.join(_EFFORTS)}", param="think"
        )
    return {"reasoning_effort": think}
