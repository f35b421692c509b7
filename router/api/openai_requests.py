"""Conversion of OpenAI request bodies to calls. Knows no HTTP; openai_responses.py has the other direction."""

from __future__ import annotations

import codecs
import difflib
import re
from collections.abc import Generator, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import ValidationError

from ...core.errors import ContextLengthExceeded, InvalidRequest, UnsupportedParameter
from ...core.sampling import SamplingOptions
from ...text.grammar_program import PARAM
from .call import UNTIL_FULL, GenerateCall
from .checks import short
from .fields import (
    ACCEPTED,
    ACCEPTED_STREAM_OPTIONS,
    INSTEAD,
    REFUSED,
    REFUSED_OF_CHATS,
    REFUSED_OF_COMPLETIONS,
    Body,
    ChatBody,
    CompletionBody,
    Known,
    StreamOptions,
)
from .http.structure import built
from .structured import SPELLINGS, rule_of

B = TypeVar("B", ChatBody, CompletionBody)
K = TypeVar("K", bound=Known)

USUAL_COMPLETION_TOKENS = 16  # OpenAI's default for max_tokens of completions
LEAST_TOP_P = 1e-12  # replaces 0, which OpenAI allows: both keep only the most likely token
MAX_NAMED = 16  # unknown fields that a response names
MAX_NAME_CHARS = 64

_UNSAFE = re.compile(r"[^A-Za-z0-9_.\[\]-]")


def parse(values: dict[str, Any], kind: type[B], *, strict: bool = False) -> tuple[B, list[str]]:
    """Check a body; returns it with the names of its unknown fields. Costs grow with the bytes, not with the errors.

    Raises:
        InvalidRequest: a field of the wrong type; with `strict` also an unknown field.
        UnsupportedParameter: a field that the API knows and this release does not serve.
    """
    refused = REFUSED | (REFUSED_OF_CHATS if kind is ChatBody else REFUSED_OF_COMPLETIONS)
    if values.get("best_of") is not None and values["best_of"] == values.get("n"):
        del values["best_of"]  # without effect: all generated choices are returned
    return checked(values, kind, ACCEPTED, refused, strict=strict)


def checked(
    values: dict[str, Any],
    kind: type[K],
    accepted: frozenset[str],
    refused: dict[str, tuple[Any, ...]],
    *,
    strict: bool,
    instead: Mapping[str, str] = INSTEAD,
) -> tuple[K, list[str]]:
    """Check a body by its classes of fields, as fields.py has them; returns it with the names of its unknown fields.

    `instead`: remedies for refused fields.

    Raises:
        InvalidRequest, UnsupportedParameter: as `parse`.
    """
    unknown: list[str] = []
    served = _served(values, kind, accepted, refused, unknown, instead=instead)
    options = served.get("stream_options")
    if isinstance(options, dict):
        inner: list[str] = []
        served["stream_options"] = _served(options, StreamOptions, ACCEPTED_STREAM_OPTIONS, {}, inner, instead={})
        unknown += [f"stream_options.{name}" for name in inner]
    if strict and unknown:
        raise _unknown(unknown[0], kind)
    try:
        body = kind.model_validate(served)
    except ValidationError as error:
        raise _explain(error, values) from None
    return body, unknown


def json_object(data: bytearray) -> Generator[None, None, dict[str, Any]]:
    """Build the fields of a body, in steps of a few milliseconds (http/structure.py).

    Raises:
        InvalidRequest: not UTF-8, not JSON, not an object, or too many lists, objects, keys or items.
    """
    if data.startswith(codecs.BOM_UTF8):  # some clients begin with a byte order mark
        del data[: len(codecs.BOM_UTF8)]
    try:
        values = yield from built(data)
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is not UTF-8 (byte {error.start}); encode it as UTF-8") from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply; a request needs five levels") from None
    except ValueError as error:
        raise InvalidRequest(f"the body is not JSON: {str(error)[:200]}") from None
    if not isinstance(values, dict):
        raise InvalidRequest(f"the body is a JSON {type(values).__name__}; must be an object")
    return values


def names_of_ignored(names: Sequence[str]) -> str:
    """Text for a header: the first names, shortened and made safe, and the number of further ones."""
    more = len(names) - MAX_NAMED
    return ", ".join([*map(_shown, names[:MAX_NAMED]), *([f"{more} more"] if more > 0 else [])])


def prompts_of(body: CompletionBody, most: int) -> list[str | list[int]]:
    """The prompts of a completion body: one, or those of its list. The validator checks the token ids.

    Raises:
        InvalidRequest: neither text nor token ids nor a list of them, or more than `most`.
    """
    prompt = body.prompt
    if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and not isinstance(prompt[0], (str, list))):
        return [prompt]
    if not isinstance(prompt, list):
        what = "must be a text, a list of token ids, or a list of either"
        raise InvalidRequest(f"prompt is {short(prompt)}; {what}", param="prompt")
    if not prompt:
        raise InvalidRequest("prompt is empty; give at least one text or token id", param="prompt")
    if len(prompt) > most:
        raise InvalidRequest(
            f"prompt lists {len(prompt)} prompts; at most {most} (router.max_prompts, router.max_running): send "
            "them in several requests",
            param="prompt",
        )
    for place, one in enumerate(prompt):
        if not isinstance(one, (str, list)):
            raise InvalidRequest(
                f"prompt[{place}] is {short(one)}; must be a text or a list of token ids, as prompt[0] is",
                param="prompt",
            )
    return prompt


def refuse_endless(body: CompletionBody, longest: int | None) -> None:
    """Refuse a prompt of token ids that is too long for every served model.

    Raises:
        ContextLengthExceeded: it has at least as many ids as the longest context.
    """
    prompt = body.prompt
    is_ids = isinstance(prompt, list) and prompt and not isinstance(prompt[0], (str, list))
    if is_ids and longest is not None and len(prompt) >= longest:
        raise ContextLengthExceeded(
            f"prompt has {len(prompt)} tokens; the model's context is {longest}: shorten it", param="prompt"
        )


def chat_call(body: ChatBody, api_key: str | None) -> GenerateCall:
    """Call of a chat body.

    Raises:
        InvalidRequest: fields contradict each other.
    """
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequest(
            f"top_logprobs is {body.top_logprobs} without logprobs; set logprobs to true", param="top_logprobs"
        )
    top_logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return GenerateCall(
        messages=body.messages,
        chat_template_kwargs=body.chat_template_kwargs,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        documents=body.documents,
        reasoning_effort=body.reasoning_effort,
        tools=body.tools,
        tool_choice=body.tool_choice,
        parallel_tool_calls=body.parallel_tool_calls,
        top_logprobs=top_logprobs,
        **_common(body, None, api_key),
    )


def completion_calls(body: CompletionBody, api_key: str | None, max_prompts: int) -> list[GenerateCall]:
    """Calls of a completion body, one per prompt.

    Raises:
        InvalidRequest: fields contradict each other, or the prompts are invalid.
    """
    common = _common(body, USUAL_COMPLETION_TOKENS, api_key)
    sampling: SamplingOptions = common["sampling"]
    if body.logprobs is not None:
        sampling["logprobs"] = body.logprobs
    if body.echo and body.logprobs is not None:
        if body.stream and (body.n or 1) > 1:
            raise InvalidRequest("echo with logprobs is streamed for n 1 only; set stream to false", param="echo")
        sampling["prompt_logprobs"] = max(body.logprobs, sampling.get("prompt_logprobs", 0))
    if body.suffix and body.echo:
        raise InvalidRequest(
            "echo and suffix are both given; the answer stands between two texts: leave one out", param="echo"
        )
    if is_scored_only(body):
        sampling["max_tokens"] = 1  # the workers' least; answers.py keeps it to itself
    return [
        GenerateCall(prompt=prompt, suffix=body.suffix or None, **common) for prompt in prompts_of(body, max_prompts)
    ]


def is_scored_only(body: Body) -> bool:
    """True if a completion asks for its prompt, with or without scores, and for no new token."""
    return isinstance(body, CompletionBody) and bool(body.echo) and body.sampling_options().get("max_tokens") == 0


def _common(body: Body, usual_max_tokens: int | None, api_key: str | None) -> dict[str, Any]:
    sampling = body.sampling_options()
    if body.stream and "prompt_logprobs" in sampling:
        raise InvalidRequest("prompt_logprobs are not streamed; set stream to false", param="prompt_logprobs")
    if sampling.get("max_tokens") == -1:  # until the context is full
        del sampling["max_tokens"]
        usual_max_tokens = UNTIL_FULL
    if sampling.get("seed") == -1:  # none, as vLLM and llama.cpp have it
        del sampling["seed"]
    if sampling.get("top_p") == 0:
        sampling["top_p"] = LEAST_TOP_P
    rule = rule_of({name: getattr(body, name) for name in ("response_format", PARAM, *SPELLINGS)})
    sampling.pop("structured_outputs", None)
    if rule is not None:
        sampling["structured_outputs"] = rule.said
    return {
        "model": body.model,
        "sampling": sampling,
        "rule_field": PARAM if rule is None else rule.field,
        "usual_max_tokens": usual_max_tokens,
        "n": body.n,
        "cache_salt": body.cache_salt,
        "priority": body.priority,
        "request_id": body.request_id,
        "api_key": api_key,
    }


# ------------------------------------------------------------------ details


def _served(
    values: dict[str, Any],
    kind: type[Known],
    accepted: frozenset[str],
    refused: dict[str, tuple[Any, ...]],
    unknown: list[str],
    *,
    instead: Mapping[str, str],
) -> dict[str, Any]:
    """Served fields with a value. Adds the names of unknown fields to `unknown`."""
    known, served = kind.model_fields, {}
    for name, value in values.items():
        if name in known:
            if value is not None:
                served[name] = value
        elif name in refused:
            if value is not None and value not in refused[name]:
                remedy = instead.get(name, "leave it out")
                raise UnsupportedParameter(f"{name} is not served yet; {remedy}", param=name)
        elif name not in accepted:
            unknown.append(name)
    return served


def _unknown(name: str, kind: type[Known]) -> InvalidRequest:
    known = [*kind.model_fields, *(f"stream_options.{option}" for option in StreamOptions.model_fields)]
    near = difflib.get_close_matches(_shown(name), known, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return InvalidRequest(f"{_shown(name)} is not a field of this API{hint}", param=_shown(name))


def _shown(name: str) -> str:
    """A client's field name, made safe for headers and errors."""
    return _UNSAFE.sub("?", name[:MAX_NAME_CHARS]) or "?"


def _explain(error: ValidationError, values: dict[str, Any]) -> InvalidRequest:
    problem = error.errors(include_url=False, include_context=False)[0]
    param = str(problem["loc"][0]) if problem["loc"] else None
    path = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "missing":
        elsewhere = "; chats go to /v1/chat/completions" if param == "prompt" and "messages" in values else ""
        return InvalidRequest(f"{path} is missing{elsewhere}", param=param)
    return InvalidRequest(f"{path[:100]} is {short(problem['input'])}: {problem['msg'][:200]}", param=param)
