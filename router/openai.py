"""OpenAI's words for what is asked: request bodies to calls. Knows no HTTP; answers.py has the words back."""

from __future__ import annotations

import difflib
import json
import math
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ..core.errors import InvalidRequest, UnsupportedParameter
from .call import Call

# Known to OpenAI's or vLLM's API and harmless to leave alone.
_IGNORED = frozenset(
    {"user", "metadata", "store", "service_tier", "prompt_cache_key", "safety_identifier", "parallel_tool_calls"}
)
# Known, not served yet: refused unless the value means "off".
_OFF_VALUES: dict[str, tuple[Any, ...]] = {
    "best_of": (None, 1),
    "suffix": (None, ""),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "reasoning_effort": (None,),
    "web_search_options": (None,),
}


class StreamOptions(BaseModel):
    """`stream_options` of a body."""

    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False
    include_obfuscation: bool = False  # accepted, without effect


class Body(BaseModel):
    """What both endpoints take."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None  # without effect: fast tokenizers put none there
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    bad_words: list[str] | None = None
    prompt_logprobs: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    request_id: str | None = None

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with a usage chunk."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatBody(Body):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


class CompletionBody(Body):
    """POST /v1/completions."""

    prompt: str | list[int]
    logprobs: int | None = None
    echo: bool | None = None


def parse(data: bytes, kind: type[ChatBody] | type[CompletionBody]) -> ChatBody | CompletionBody:
    """A checked body.

    Raises:
        InvalidRequest: not UTF-8, not JSON, a field of the wrong type, an unknown field (names the nearest).
        UnsupportedParameter: a field that the API knows and this release does not serve.
    """
    values = _json_object(data)
    for name in list(values):
        if name in _IGNORED:
            del values[name]
        elif name in _OFF_VALUES:
            if values[name] not in _OFF_VALUES[name]:
                raise UnsupportedParameter(f"{name} is not served yet; leave it out", param=name)
            del values[name]
    prompt = values.get("prompt")
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        if len(prompt) > 1:
            raise InvalidRequest("prompt is a list of prompts; send one request per prompt", param="prompt")
        values["prompt"] = prompt[0]  # many clients wrap their one prompt in a list
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise _explain(error, kind) from None


def chat_call(body: ChatBody, api_key: str | None) -> Call:
    """The call that a chat body means."""
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise InvalidRequest("max_tokens and max_completion_tokens differ; give one", param="max_completion_tokens")
    max_tokens = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequest(
            f"top_logprobs is {body.top_logprobs} without logprobs; set logprobs to true", param="top_logprobs"
        )
    top_logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return Call(messages=body.messages, top_logprobs=top_logprobs, **_common(body, max_tokens, api_key))


def completion_call(body: CompletionBody, api_key: str | None) -> Call:
    """The call that a completion body means."""
    usual = 16  # OpenAI's default for this endpoint
    common = _common(body, body.max_tokens, api_key)
    if body.echo and body.logprobs is not None:
        if body.stream and (body.n or 1) > 1:
            raise InvalidRequest("echo with logprobs is streamed for n 1 only; set stream to false", param="echo")
        common["prompt_logprobs"] = max(body.logprobs, body.prompt_logprobs or 0)
    return Call(prompt=body.prompt, usual_max_tokens=usual, logprobs=body.logprobs, **common)


def _common(body: Body, max_tokens: int | None, api_key: str | None) -> dict[str, Any]:
    if body.stream and body.prompt_logprobs is not None:
        raise InvalidRequest("prompt_logprobs are not streamed; set stream to false", param="prompt_logprobs")
    stop = [body.stop] if isinstance(body.stop, str) else (body.stop or ())
    return {
        "model": body.model,
        "max_tokens": max_tokens,
        "min_tokens": body.min_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "seed": body.seed,
        "n": body.n,
        "stop": tuple(stop),
        "stop_token_ids": tuple(body.stop_token_ids or ()),
        "ignore_eos": bool(body.ignore_eos),
        "include_stop_str_in_output": bool(body.include_stop_str_in_output),
        "skip_special_tokens": body.skip_special_tokens is not False,
        "min_p": body.min_p,
        "repetition_penalty": body.repetition_penalty,
        "frequency_penalty": body.frequency_penalty,
        "presence_penalty": body.presence_penalty,
        "logit_bias": body.logit_bias,
        "bad_words": tuple(body.bad_words or ()),
        "prompt_logprobs": body.prompt_logprobs,
        "request_id": body.request_id,
        "api_key": api_key,
    }


# ------------------------------------------------------------------ details


def _json_object(data: bytes) -> dict[str, Any]:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is not UTF-8 (byte {error.start}); encode it as UTF-8") from None
    try:
        values = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply; a request needs five levels") from None
    except ValueError as error:
        raise InvalidRequest(f"the body is not JSON: {str(error)[:200]}") from None
    if not isinstance(values, dict):
        raise InvalidRequest(f"the body is a JSON {type(values).__name__}; must be an object")
    return values


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _explain(error: ValidationError, kind: type[BaseModel]) -> InvalidRequest:
    problem = error.errors(include_url=False)[0]
    param = str(problem["loc"][0]) if problem["loc"] else None
    path = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(problem["loc"][-1]), kind.model_fields, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return InvalidRequest(f"{path[:100]} is not a field of this API{hint}", param=param)
    if problem["type"] == "missing":
        return InvalidRequest(f"{path} is missing", param=param)
    value = problem["input"]
    shown = repr(value)[:80] if not (isinstance(value, float) and not math.isfinite(value)) else str(value)
    return InvalidRequest(f"{path} is {shown}: {problem['msg']}", param=param)
