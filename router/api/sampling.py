"""Sampling parameters of a call, checked against the model: every field of `SamplingParams`. Knows no protocol."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from ...core.errors import ContextLengthExceeded, InvalidRequest
from ...core.request import SamplingParams
from .call import UNTIL_FULL, GenerateCall
from .checks import integer, number, short, text_of
from .defaults import (
    LEAST_REPETITION_PENALTY,
    MAX_REPETITION_PENALTY,
    MAX_STOPS,
    MAX_TEMPERATURE,
)
from .models import ServedModel

MAX_STOP_CHARS = 256
MAX_STOP_IDS = 256
MAX_SEED = 2**64 - 1
MIN_SEED = -(2**63)  # 64 bits, signed or unsigned
MAX_PENALTY = 2.0  # positive or negative, as in OpenAI's API
MAX_BIAS = 100.0
MAX_BIASES = 1024
MAX_BAD_WORDS = 128
MAX_BAD_WORD_CHARS = 256
MAX_BAD_WORD_TOKENS = 8192  # in total; a running request keeps them here and on its worker
MAX_LOGPROBS = 20  # OpenAI's bound for chats; its bound for completions is 5
MAX_PROMPT_SCORES = 1 << 18  # prompt tokens times numbers per token: they are sent in one message


def sampling_of(
    call: GenerateCall, model: ServedModel, prompt_ids: Sequence[int], default_max_tokens: int | None
) -> SamplingParams:
    """Parameters of a call whose prompt is known; fields not given have the checkpoint's default, or a neutral value.

    Raises:
        InvalidRequest: a field is out of range or of the wrong type; `param` names it.
        ContextLengthExceeded: prompt and `max_tokens` do not fit the model together.
    """
    defaults = model.defaults
    max_tokens = _max_tokens(call, model, len(prompt_ids), default_max_tokens)
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=number("temperature", call.temperature, defaults.temperature, 0.0, MAX_TEMPERATURE),
        top_p=_top_p(call.top_p, defaults.top_p),
        top_k=_top_k(call.top_k, defaults.top_k, model.vocab_size),
        min_p=number("min_p", call.min_p, defaults.min_p, 0.0, 1.0),
        seed=integer("seed", call.seed, secrets.randbits(62), MIN_SEED, MAX_SEED) % (1 << 64),
        repetition_penalty=_repetition_penalty(call.repetition_penalty, defaults.repetition_penalty),
        frequency_penalty=number("frequency_penalty", call.frequency_penalty, 0.0, -MAX_PENALTY, MAX_PENALTY),
        presence_penalty=number("presence_penalty", call.presence_penalty, 0.0, -MAX_PENALTY, MAX_PENALTY),
        logit_bias=_biases(call.logit_bias or {}, model),
        bad_words=_bad_words(call.bad_words, model) or defaults.bad_words,
        stop=_stops(call.stop) or defaults.stop,
        stop_token_ids=_stop_ids(call.stop_token_ids, model),
        ignore_eos=bool(call.ignore_eos),
        include_stop=bool(call.include_stop_str_in_output),
        skip_special_tokens=bool(call.skip_special_tokens),
        min_tokens=integer("min_tokens", call.min_tokens, min(defaults.min_tokens, max_tokens), 0, max_tokens),
        logprobs=_logprobs(call),
        prompt_logprobs=_prompt_logprobs(call.prompt_logprobs, len(prompt_ids)),
    )


def _max_tokens(call: GenerateCall, model: ServedModel, num_prompt: int, default: int | None) -> int:
    """max_tokens as given; else the default of the API, the operator or the checkpoint; else all that fit."""
    room = model.max_model_len - num_prompt
    max_tokens = call.max_tokens
    if max_tokens is None:
        max_tokens = min(room, _usual(call, model, default) or room)
    if isinstance(max_tokens, int) and not isinstance(max_tokens, bool) and max_tokens < 1:
        raise InvalidRequest(
            f"max_tokens is {short(max_tokens)}; must be 1 or more (over HTTP also -1: until the context is full, "
            "and 0 with echo: the prompt alone)",
            param="max_tokens",
        )
    integer("max_tokens", max_tokens, max_tokens, 1, 2**31 - 1)
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
    """True if the client or a default limits the length of the answer."""
    return call.max_tokens is not None or (_usual(call, model, default_max_tokens) or UNTIL_FULL) < UNTIL_FULL


def _top_p(value: float | None, default: float) -> float:
    top_p = number("top_p", value, default, 0.0, 1.0)
    if top_p == 0.0:
        raise InvalidRequest("top_p is 0; must be above 0 and at most 1", param="top_p")
    return top_p


def _top_k(value: int | None, default: int, vocab_size: int) -> int:
    """Check top_k; 0, vLLM's -1, and values of at least the vocabulary mean off (0)."""
    top_k = 0 if value == -1 else integer("top_k", value, default, 0, 2**63 - 1)
    return 0 if top_k >= vocab_size else top_k


def _repetition_penalty(value: float | None, default: float) -> float:
    penalty = number("repetition_penalty", value, default, 0.0, MAX_REPETITION_PENALTY)
    if penalty < LEAST_REPETITION_PENALTY:
        raise InvalidRequest(
            f"repetition_penalty is {penalty:g}; must be from {LEAST_REPETITION_PENALTY:g} to "
            f"{MAX_REPETITION_PENALTY:g}, 1 is off",
            param="repetition_penalty",
        )
    return penalty


def _biases(biases: Mapping[Any, Any], model: ServedModel) -> tuple[tuple[int, float], ...]:
    """Check biases; returns them sorted by token id. In JSON the ids are texts."""
    if len(biases) > MAX_BIASES:
        raise InvalidRequest(f"logit_bias has {len(biases)} entries; at most {MAX_BIASES}", param="logit_bias")
    checked: dict[int, float] = {}
    for key, value in biases.items():
        is_id = isinstance(key, int) or (isinstance(key, str) and key.isascii() and key.isdecimal())
        token_id = int(key) if is_id and len(str(key)) < 20 else -1
        if not 0 <= token_id < model.vocab_size or token_id in checked:
            raise InvalidRequest(
                f"logit_bias has the key {short(key)}; must be a token id from 0 to {model.vocab_size - 1}, each once",
                param="logit_bias",
            )
        checked[token_id] = number(f"logit_bias[{token_id}]", value, 0.0, -MAX_BIAS, MAX_BIAS)
    return tuple(sorted(checked.items()))


def _bad_words(words: Sequence[str], model: ServedModel) -> tuple[tuple[int, ...], ...]:
    """Token ids of each word at the start of a text and after a space.

    If the space is only one more token in front, the word alone covers both.
    """
    _check_texts("bad_words", words, MAX_BAD_WORDS, MAX_BAD_WORD_CHARS)
    found: dict[tuple[int, ...], None] = {}
    num_tokens = 0
    for word in words:
        bare = word.lstrip() or word
        alone = tuple(model.tokenizer.encode(bare, add_special_tokens=False))
        spaced = tuple(model.tokenizer.encode(" " + bare, add_special_tokens=False))
        found[alone] = None
        if spaced[-len(alone) :] != alone:
            found[spaced] = None
        num_tokens += len(alone) + len(spaced)
        if num_tokens > MAX_BAD_WORD_TOKENS:
            raise InvalidRequest(
                f"bad_words have more than {MAX_BAD_WORD_TOKENS} tokens; give fewer or shorter words", param="bad_words"
            )
    found.pop((), None)
    return tuple(found)


def _stops(stops: Sequence[str]) -> tuple[str, ...]:
    _check_texts("stop", stops, MAX_STOPS, MAX_STOP_CHARS)
    return tuple(stops)


def _check_texts(name: str, texts: Sequence[str], most: int, most_chars: int) -> None:
    if len(texts) > most:
        raise InvalidRequest(f"{name} has {len(texts)} strings; at most {most}", param=name)
    for place, text in enumerate(texts):
        if not isinstance(text, str) or not 1 <= len(text) <= most_chars:
            raise InvalidRequest(
                f"{name}[{place}] is {short(text)}; must be a string of 1 to {most_chars} characters", param=name
            )
        text_of(name, text)


def _stop_ids(ids: Sequence[int], model: ServedModel) -> tuple[int, ...]:
    if len(ids) > MAX_STOP_IDS:
        raise InvalidRequest(f"stop_token_ids has {len(ids)} entries; at most {MAX_STOP_IDS}", param="stop_token_ids")
    for place, token_id in enumerate(ids):
        integer(f"stop_token_ids[{place}]", token_id, 0, 0, model.vocab_size - 1)
    return tuple(ids)


def _logprobs(call: GenerateCall) -> int | None:
    if call.top_logprobs is not None:
        return integer("top_logprobs", call.top_logprobs, 0, 0, MAX_LOGPROBS)
    return None if call.logprobs is None else integer("logprobs", call.logprobs, 0, 0, MAX_LOGPROBS)


def _prompt_logprobs(value: int | None, num_prompt: int) -> int | None:
    if value is None:
        return None
    num_top = integer("prompt_logprobs", value, 0, 0, MAX_LOGPROBS)
    if num_prompt * (num_top + 1) > MAX_PROMPT_SCORES:
        raise InvalidRequest(
            f"prompt_logprobs is {num_top} for a prompt of {num_prompt} tokens, which makes more than "
            f"{MAX_PROMPT_SCORES} numbers; ask for fewer per token, or shorten the prompt",
            param="prompt_logprobs",
        )
    return num_top
