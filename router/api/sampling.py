"""Sampling parameters of a call, checked against the model: every field of `SamplingParams`. Knows no protocol."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...core.errors import ContextLengthExceeded, InvalidRequest
from ...core.request import Grammar, SamplingParams
from ...core.sampling import FIELDS, MOST_INT32, Form, SamplingField, SamplingOptions
from ...text.grammar_program import PARAM, grammar_of
from .call import UNTIL_FULL, GenerateCall
from .checks import integer, number, short, text_of
from .models import ServedModel
from .structured import named

MAX_BAD_WORD_TOKENS = 8192  # of all: a running request keeps them here and on its worker
MAX_PROMPT_SCORES = 1 << 18  # prompt tokens times what is said of each: they travel in one message


@dataclass(frozen=True, slots=True)
class Asked:
    """A call whose prompt is known, and the model that it asks."""

    said: SamplingOptions
    top_logprobs: int | None
    model: ServedModel
    num_prompt: int  # tokens
    max_tokens: int  # checked
    rule_field: str  # of the client that gave the rule for the text


def sampling_of(
    call: GenerateCall, model: ServedModel, prompt_ids: Sequence[int], default_max_tokens: int | None
) -> SamplingParams:
    """Parameters of a call whose prompt is known; fields not given have the checkpoint's default, or a neutral value.

    Raises:
        InvalidRequest: a field is out of range or of the wrong type; `param` names it.
        ContextLengthExceeded: prompt and `max_tokens` do not fit the model together.
    """
    max_tokens = _max_tokens(call, model, len(prompt_ids), default_max_tokens)
    asked = Asked(call.sampling, call.top_logprobs, model, len(prompt_ids), max_tokens, call.rule_field)
    values: dict[str, Any] = {}
    try:
        for field in FIELDS:
            check = OWN_CHECKS.get(field.name)
            values[field.name] = check(field, asked) if check else _checked(field, asked)
    except InvalidRequest as error:
        raise named(error, call.rule_field) from None
    return SamplingParams(**values)


def _checked(field: SamplingField, asked: Asked) -> Any:
    """A value within its row's bounds. Raises InvalidRequest."""
    value: Any = asked.said.get(field.api)
    default = _default(field, asked)
    if field.form is Form.WHOLE:
        return integer(field.api, value, default, int(field.low), int(field.high))
    if field.form is Form.NUMBER:
        return number(field.api, value, default, field.low, field.high)
    if field.form is Form.FLAG:
        return bool(default if value is None else value)
    values = value or ()
    if field.form is Form.TEXTS:
        return _texts(field, values) or default
    if field.form is Form.TOKEN_IDS:
        return _token_ids(field, values, asked.model) or default
    raise AssertionError(f"{field.name} needs a check of its own")


def _default(field: SamplingField, asked: Asked) -> Any:
    """The checkpoint's default where it may give one, else the neutral value."""
    return getattr(asked.model.defaults, field.name) if field.checkpoint else field.neutral


def _max_tokens(call: GenerateCall, model: ServedModel, num_prompt: int, default: int | None) -> int:
    """max_tokens as given; else the default of the API, the operator or the checkpoint; else all that fit."""
    room = model.max_model_len - num_prompt
    max_tokens = call.sampling.get("max_tokens")
    if max_tokens is None:
        max_tokens = min(room, _usual(call, model, default) or room)
    if isinstance(max_tokens, int) and not isinstance(max_tokens, bool) and max_tokens < 1:
        raise InvalidRequest(
            f"max_tokens is {short(max_tokens)}; must be 1 or more (over HTTP also -1: until the context is full, "
            "and 0 with echo: the prompt alone)",
            param="max_tokens",
        )
    integer("max_tokens", max_tokens, max_tokens, 1, MOST_INT32)
    if max_tokens > room:
        raise ContextLengthExceeded(
            f"max_tokens is {max_tokens}, and the prompt has {num_prompt} tokens; together at most "
            f"{model.max_model_len}: ask for {room} or less",
            param="max_tokens",
        )
    return max_tokens


def _usual(call: GenerateCall, model: ServedModel, default: int | None) -> int | None:
    return call.usual_max_tokens or default or model.defaults.max_tokens


def is_bounded(call: GenerateCall, model: ServedModel, default_max_tokens: int | None) -> bool:
    """True if the client or the checkpoint bounds the answer's length."""
    usual = _usual(call, model, default_max_tokens) or UNTIL_FULL
    return call.sampling.get("max_tokens") is not None or usual < UNTIL_FULL


# ------------------------------------------------------------------ fields whose bounds do not say everything


def _top_p(field: SamplingField, asked: Asked) -> float:
    top_p: float = _checked(field, asked)
    if top_p == 0.0:
        raise InvalidRequest("top_p is 0; must be above 0 and at most 1", param="top_p")
    return top_p


def _top_k(field: SamplingField, asked: Asked) -> int:
    """0, vLLM's -1 and every value that keeps the whole vocabulary: off."""
    top_k: int = 0 if asked.said.get("top_k") == -1 else _checked(field, asked)
    return 0 if top_k >= asked.model.vocab_size else top_k


def _seed(field: SamplingField, asked: Asked) -> int:
    """64 bits; drawn where none is given."""
    return integer("seed", asked.said.get("seed"), secrets.randbits(62), int(field.low), int(field.high)) % (1 << 64)


def _repetition_penalty(field: SamplingField, asked: Asked) -> float:
    penalty: float = _checked(field, asked)
    if penalty < (least := field.least_default or field.low):
        raise InvalidRequest(
            f"repetition_penalty is {penalty:g}; must be from {least:g} to {field.high:g}, 1 is off",
            param="repetition_penalty",
        )
    return penalty


def _biases(field: SamplingField, asked: Asked) -> tuple[tuple[int, float], ...]:
    """By token id, rising. JSON has ids as texts."""
    biases: Mapping[Any, Any] = asked.said.get("logit_bias") or {}
    vocab_size = asked.model.vocab_size
    if len(biases) > field.max_entries:
        raise InvalidRequest(f"logit_bias has {len(biases)} entries; at most {field.max_entries}", param="logit_bias")
    checked: dict[int, float] = {}
    for key, value in biases.items():
        is_id = isinstance(key, int) or (isinstance(key, str) and key.isascii() and key.isdecimal())
        token_id = int(key) if is_id and len(str(key)) < 20 else -1
        if not 0 <= token_id < vocab_size or token_id in checked:
            raise InvalidRequest(
                f"logit_bias has the key {short(key)}; must be a token id from 0 to {vocab_size - 1}, each once",
                param="logit_bias",
            )
        checked[token_id] = number(f"logit_bias[{token_id}]", value, 0.0, field.low, field.high)
    return tuple(sorted(checked.items()))


def _bad_words(field: SamplingField, asked: Asked) -> tuple[tuple[int, ...], ...]:
    """Each word as it stands at the start of a text and behind a space.

    If the space is only one more token in front, the word alone covers both.
    """
    words = _texts(field, asked.said.get("bad_words") or ())
    found: dict[tuple[int, ...], None] = {}
    num_tokens = 0
    for word in words:
        bare = word.lstrip() or word
        alone = tuple(asked.model.tokenizer.encode(bare, add_special_tokens=False))
        spaced = tuple(asked.model.tokenizer.encode(" " + bare, add_special_tokens=False))
        found[alone] = None
        if spaced[-len(alone) :] != alone:
            found[spaced] = None
        num_tokens += len(alone) + len(spaced)
        if num_tokens > MAX_BAD_WORD_TOKENS:
            raise InvalidRequest(
                f"bad_words have more than {MAX_BAD_WORD_TOKENS} tokens; give fewer or shorter words", param="bad_words"
            )
    found.pop((), None)
    return tuple(found) or asked.model.defaults.bad_words


def _min_tokens(field: SamplingField, asked: Asked) -> int:
    default = min(asked.model.defaults.min_tokens, asked.max_tokens)
    if asked.said.get(PARAM) is not None:
        default = 0  # a rule decides where its text ends
    return integer("min_tokens", asked.said.get("min_tokens"), default, int(field.low), asked.max_tokens)


def _logprobs(field: SamplingField, asked: Asked) -> int | None:
    if asked.top_logprobs is not None:
        return integer("top_logprobs", asked.top_logprobs, 0, int(field.low), int(field.high))
    num_top: int | None = _checked(field, asked)
    return num_top


def _prompt_logprobs(field: SamplingField, asked: Asked) -> int | None:
    num_top: int | None = _checked(field, asked)
    if num_top is not None and asked.num_prompt * (num_top + 1) > MAX_PROMPT_SCORES:
        raise InvalidRequest(
            f"prompt_logprobs is {num_top} for a prompt of {asked.num_prompt} tokens, which makes more than "
            f"{MAX_PROMPT_SCORES} numbers; ask for fewer per token, or shorten the prompt",
            param="prompt_logprobs",
        )
    return num_top


def _grammar(field: SamplingField, asked: Asked) -> Grammar | None:
    """The rule for the text. Whether it can be followed, grammar_checks.py finds out."""
    rule = asked.said.get(PARAM)
    if rule is None:
        return None
    for name in ("ignore_eos", "min_tokens"):
        if asked.said.get(name):
            raise InvalidRequest(
                f"{name} is {asked.said[name]} beside {asked.rule_field}, whose text ends where it is complete; "
                "leave one out",
                param=name,
            )
    return grammar_of(rule)


OWN_CHECKS: Mapping[str, Callable[[SamplingField, Asked], Any]] = {
    "max_tokens": lambda _, asked: asked.max_tokens,
    "top_p": _top_p,
    "top_k": _top_k,
    "seed": _seed,
    "repetition_penalty": _repetition_penalty,
    "logit_bias": _biases,
    "bad_words": _bad_words,
    "min_tokens": _min_tokens,
    "logprobs": _logprobs,
    "prompt_logprobs": _prompt_logprobs,
    "grammar": _grammar,
}

# ------------------------------------------------------------------ lists


def _texts(field: SamplingField, texts: Sequence[str]) -> tuple[str, ...]:
    """The texts of a list, or of one text where the field takes it. Raises InvalidRequest."""
    name = field.api
    if field.takes_one and isinstance(texts, str):
        texts = (texts,)
    if len(texts) > field.max_entries:
        raise InvalidRequest(f"{name} has {len(texts)} strings; at most {field.max_entries}", param=name)
    for place, text in enumerate(texts):
        if not isinstance(text, str) or not 1 <= len(text) <= field.max_chars:
            raise InvalidRequest(
                f"{name}[{place}] is {short(text)}; must be a string of 1 to {field.max_chars} characters", param=name
            )
        text_of(name, text)
    return tuple(texts)


def _token_ids(field: SamplingField, ids: Sequence[int], model: ServedModel) -> tuple[int, ...]:
    """The token ids of a list, all of them in the vocabulary. Raises InvalidRequest."""
    name = field.api
    if len(ids) > field.max_entries:
        raise InvalidRequest(f"{name} has {len(ids)} entries; at most {field.max_entries}", param=name)
    for place, token_id in enumerate(ids):
        integer(f"{name}[{place}]", token_id, 0, 0, model.vocab_size - 1)
    return tuple(ids)
