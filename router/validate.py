"""The one validator: a `Call` from either face becomes a `Request`, or a typed error that names field and remedy.

Nothing a client sends reaches a worker unchecked; what is refused here costs a worker nothing.
"""

from __future__ import annotations

import hashlib
import math
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.errors import ContextLengthExceeded, InvalidRequest, Unauthenticated
from ..core.request import Request, SamplingParams
from .call import Call
from .config import RouterConfig
from .models import ServedModel

MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_STOP_IDS = 256
MAX_MESSAGES = 2048
MAX_SEED = 2**63
MAX_TEMPERATURE = 100.0
DEFAULT_ISOLATION_DOMAIN = "public"

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Limits:
    """What the router's configuration allows."""

    max_choices: int
    default_max_tokens: int
    request_timeout_s: float
    api_keys: tuple[str, ...]

    @classmethod
    def of(cls, config: RouterConfig) -> Limits:
        """From the router's section."""
        return cls(config.max_choices, config.default_max_tokens, config.request_timeout_s, config.api_keys)


def authenticate(api_key: str | None, limits: Limits) -> str:
    """The isolation domain that a key stands for; without configured keys everybody shares one.

    Raises:
        Unauthenticated: keys are configured and this is none of them.
    """
    if not limits.api_keys:
        return DEFAULT_ISOLATION_DOMAIN
    for known in limits.api_keys:
        if secrets.compare_digest((api_key or "").encode(errors="replace"), known.encode()):
            # Of the key itself: its place in the configuration may change, and must not hand cached prefixes over.
            return "key-" + hashlib.blake2b(known.encode(), digest_size=8, person=b"twostroke-tenant").hexdigest()
    raise Unauthenticated("the API key is missing or unknown; send 'Authorization: Bearer KEY'")


def validate(call: Call, model: ServedModel, limits: Limits) -> Request:
    """Check every field, template and tokenise. Runs in a thread: it may take milliseconds.

    Raises:
        InvalidRequest: a field is out of range, of the wrong type or not served; `param` names it.
        ContextLengthExceeded: the prompt leaves no room for a token, or not for `max_tokens`.
        Unauthenticated: see `authenticate`.
    """
    domain = authenticate(call.api_key, limits)
    num_choices = _integer("n", call.n, 1, 1, limits.max_choices)
    request_id = _request_id(call)
    prompt_ids = _prompt_ids(call, model)
    sampling = _sampling(call, model, limits, len(prompt_ids))
    timeout_s = min(call.timeout_s or limits.request_timeout_s, limits.request_timeout_s)
    return Request(
        request_id=request_id,
        model=model.name,
        prompt_ids=prompt_ids,
        sampling=sampling,
        num_choices=num_choices,
        isolation_domain=domain,
        timeout_s=timeout_s,
        is_chat=call.messages is not None,
    )


def new_request_id(is_chat: bool) -> str:
    """A name for a request whose client gave none; nobody else can guess it."""
    return ("chatcmpl-" if is_chat else "cmpl-") + secrets.token_hex(12)


def is_request_id(text: str) -> bool:
    """Whether a client may name its request so."""
    return _REQUEST_ID.fullmatch(text) is not None


def _request_id(call: Call) -> str:
    if not call.request_id:
        return new_request_id(call.messages is not None)
    if not is_request_id(call.request_id):
        raise InvalidRequest(
            f"request_id is {call.request_id[:40]!r}; use 1 to 128 of letters, digits, '.', '_', ':' and '-'",
            param="request_id",
        )
    return call.request_id


def _prompt_ids(call: Call, model: ServedModel) -> tuple[int, ...]:
    if (call.prompt is None) == (call.messages is None):
        raise InvalidRequest("give exactly one of prompt and messages", param="prompt")
    if call.prompt is not None and len(call.prompt) == 0:
        raise InvalidRequest("prompt is empty; give at least one character or token", param="prompt")
    if call.messages is not None:
        if model.template is None:
            raise InvalidRequest(f"{model.name} has no chat template; use completions", param="messages")
        text = model.template.render(_messages(call.messages), add_generation_prompt=True)
        ids: Sequence[int] = model.tokenizer.encode(_text("messages", text), add_special_tokens=False)
        where = "messages"
    elif isinstance(call.prompt, str):
        ids = model.tokenizer.encode(_text("prompt", call.prompt), add_special_tokens=True)
        where = "prompt"
    else:
        ids, where = _token_ids(call.prompt or (), model), "prompt"
    if not ids:
        raise InvalidRequest(f"{where} is empty; give at least one token", param=where)
    if len(ids) >= model.max_model_len:
        raise ContextLengthExceeded(
            f"{where} has {len(ids)} tokens; the model's context is {model.max_model_len}: shorten it", param=where
        )
    return tuple(ids)


def _token_ids(ids: Sequence[int], model: ServedModel) -> Sequence[int]:
    for place, token_id in enumerate(ids):
        if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < model.vocab_size:
            raise InvalidRequest(
                f"prompt[{place}] is {token_id!r}; must be a token id from 0 to {model.vocab_size - 1}", param="prompt"
            )
    return ids


def _messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    if not messages:
        raise InvalidRequest("messages is empty; give at least one message", param="messages")
    if len(messages) > MAX_MESSAGES:
        raise InvalidRequest(f"messages has {len(messages)} entries; at most {MAX_MESSAGES}", param="messages")
    checked = []
    for place, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in _ROLES:
            raise InvalidRequest(
                f"messages[{place}].role is {role!r}; must be one of {', '.join(_ROLES)}",
                param=f"messages[{place}].role",
            )
        checked.append({"role": role, "content": _content(content, f"messages[{place}].content")})
    return checked


def _content(content: Any, where: str) -> str:
    """Text, or OpenAI's list of parts as long as all of them are text."""
    if isinstance(content, str):
        return _text(where, content)
    if isinstance(content, Sequence) and content and all(isinstance(part, Mapping) for part in content):
        kinds = {part.get("type") for part in content}
        if kinds == {"text"} and all(isinstance(part.get("text"), str) for part in content):
            return _text(where, "".join(part["text"] for part in content))
        raise InvalidRequest(f"{where} has parts of type {sorted(map(str, kinds))}; only text is served", param=where)
    raise InvalidRequest(f"{where} is {_short(content)}; must be a string or a list of text parts", param=where)


def _sampling(call: Call, model: ServedModel, limits: Limits, num_prompt: int) -> SamplingParams:
    room = model.max_model_len - num_prompt
    max_tokens = call.max_tokens
    if max_tokens is None:
        max_tokens = min(room, call.usual_max_tokens or limits.default_max_tokens)
    _integer("max_tokens", max_tokens, max_tokens, 1, 2**31 - 1)
    if max_tokens > room:
        raise ContextLengthExceeded(
            f"max_tokens is {max_tokens}, and the prompt has {num_prompt} tokens; together at most "
            f"{model.max_model_len}: ask for {room} or less",
            param="max_tokens",
        )
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=_number("temperature", call.temperature, 1.0, 0.0, MAX_TEMPERATURE),
        top_p=_top_p(call.top_p),
        top_k=_integer("top_k", None if call.top_k == -1 else call.top_k, 0, 0, model.vocab_size),  # -1: vLLM's "off"
        seed=_integer("seed", call.seed, secrets.randbits(62), -MAX_SEED, MAX_SEED - 1) % (1 << 64),
        stop=_stops(call.stop),
        stop_token_ids=_stop_ids(call.stop_token_ids, model),
        ignore_eos=bool(call.ignore_eos),
        min_tokens=_integer("min_tokens", call.min_tokens, 0, 0, max_tokens),
    )


def _top_p(value: float | None) -> float:
    top_p = _number("top_p", value, 1.0, 0.0, 1.0)
    if top_p == 0.0:
        raise InvalidRequest("top_p is 0; must be above 0 and at most 1", param="top_p")
    return top_p


def _stops(stops: Sequence[str]) -> tuple[str, ...]:
    if len(stops) > MAX_STOPS:
        raise InvalidRequest(f"stop has {len(stops)} strings; at most {MAX_STOPS}", param="stop")
    for place, stop in enumerate(stops):
        if not isinstance(stop, str) or not 1 <= len(stop) <= MAX_STOP_CHARS:
            raise InvalidRequest(
                f"stop[{place}] is {_short(stop)}; must be a string of 1 to {MAX_STOP_CHARS} characters", param="stop"
            )
        _text("stop", stop)
    return tuple(stops)


def _stop_ids(ids: Sequence[int], model: ServedModel) -> tuple[int, ...]:
    if len(ids) > MAX_STOP_IDS:
        raise InvalidRequest(f"stop_token_ids has {len(ids)} entries; at most {MAX_STOP_IDS}", param="stop_token_ids")
    for place, token_id in enumerate(ids):
        _integer(f"stop_token_ids[{place}]", token_id, 0, 0, model.vocab_size - 1)
    return tuple(ids)


def _integer(name: str, value: Any, default: int, low: int, high: int) -> int:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidRequest(f"{name} is {_short(value)}; must be a whole number from {low} to {high}", param=name)
    return value


def _number(name: str, value: Any, default: float, low: float, high: float) -> float:
    if value is None:
        return default
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not good or not math.isfinite(value) or not low <= value <= high:
        raise InvalidRequest(f"{name} is {_short(value)}; must be a number from {low:g} to {high:g}", param=name)
    return float(value)


def _text(name: str, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"{name} holds a lone surrogate at character {error.start}; send valid Unicode", param=name
        ) from None
    return text


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
