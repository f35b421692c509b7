"""The table of sampling fields: one row per field of `SamplingParams`, read by every part that carries or checks one.

A row drives the JSON body, the public gRPC message, the options of the SDK, the check of a client's value, the default
of a checkpoint, the message from router to worker in both directions, and `explain`. Neutral values and types stand in
`SamplingParams`; `SamplingOptions` has the same fields as clients write them.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any, NamedTuple, TypedDict

from .request import SamplingParams

MOST_INT32 = 2**31 - 1
ABOVE_ZERO = math.ulp(0.0)
FINITE = sys.float_info.max
MAX_GRAMMAR_CHARS = 1 << 17  # of the source of a grammar

_NEUTRAL = {field.name: field.default for field in fields(SamplingParams)}


class SamplingOptions(TypedDict, total=False):
    """Sampling by the names of the API. Left out: the model's or the server's default."""

    max_tokens: int
    temperature: float  # 0 = greedy
    top_p: float
    top_k: int  # 0 = off
    min_p: float  # least probability as a part of the likeliest token's; 0 = off
    repetition_penalty: float  # of tokens in prompt or output; 1 = off
    frequency_penalty: float  # of the output, per occurrence
    presence_penalty: float  # of the output
    logit_bias: Mapping[int, float]  # by token id, -100 to 100
    bad_words: Sequence[str]  # never said
    seed: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    include_stop_str_in_output: bool
    skip_special_tokens: bool  # False: special tokens give text, and stop strings can hold it
    ignore_eos: bool
    min_tokens: int
    logprobs: int  # how likely every token was, with so many of the likeliest
    prompt_logprobs: int  # the same of every prompt token but the first
    structured_outputs: Mapping[str, Any]  # one of json, regex, choice, grammar, structural_tag: the rule for the text


class Form(Enum):
    """Form of a field's value."""

    WHOLE = "whole number"
    NUMBER = "number"
    FLAG = "true or false"
    TEXTS = "texts"
    TOKEN_IDS = "token ids"
    WORDS = "words"  # texts from clients, token ids in `SamplingParams`
    BIASES = "entries"  # numbers by token id
    GRAMMAR = "characters"  # a kind and its source; clients write an object with one key


class Range(NamedTuple):
    """Numbers with which a worker can compute, both ends included. NaN is outside of every range."""

    low: float
    high: float
    remedy: str  # how an error describes the range


@dataclass(frozen=True, slots=True)
class SamplingField:
    """One field of `SamplingParams`: its names, its form and its bounds.

    `low`, `high`, `max_entries` and `max_chars` bound what a client may send. Where they do not say everything,
    `router/api/sampling.py` has a check of its own for the field, and `router/api/defaults.py` for its default.
    """

    name: str  # in `SamplingParams`
    form: Form
    low: float = -math.inf
    high: float = math.inf
    max_entries: int = 0  # of a list; 0: the value is no list
    max_chars: int = 0  # of each text
    takes_one: bool = False  # a text alone stands for a list of one
    api_name: str | None = None  # in JSON bodies, the public gRPC message and the SDK; None: `name`
    aliases: tuple[str, ...] = ()  # further names in JSON bodies
    is_in_every_body: bool = True  # False: chats and completions write it in different forms
    wire_name: str | None = None  # in the message from router to worker; None: the name of the API
    is_required: bool = False  # in the message from router to worker
    computable: Range | None = None  # what a worker refuses outside of; None: nothing, but infinite numbers
    checkpoint: str | None = None  # name of its default in generation_config.json; None: a checkpoint gives none
    least_default: float | None = None  # of a checkpoint; None: `low`
    gguf: str | None = None  # name of its default under a GGUF file's `general.sampling`

    @property
    def api(self) -> str:
        """Its name in JSON bodies, the public gRPC message and the options of the SDK."""
        return self.api_name or self.name

    @property
    def wire(self) -> str:
        """Its name in the protobuf message from router to worker."""
        return self.wire_name or self.api

    @property
    def is_list(self) -> bool:
        """True if clients send a list."""
        return self.form in (Form.TEXTS, Form.TOKEN_IDS, Form.WORDS)

    @property
    def neutral(self) -> Any:
        """The value of `SamplingParams` where nothing was said."""
        return _NEUTRAL[self.name]


# In the order in which a client's values are checked.
FIELDS: tuple[SamplingField, ...] = (
    SamplingField(
        "max_tokens",
        Form.WHOLE,
        1,
        MOST_INT32,
        aliases=("max_completion_tokens",),
        is_required=True,
        computable=Range(1, math.inf, "1 or more"),
        checkpoint="max_new_tokens",
    ),
    SamplingField(
        "temperature",
        Form.NUMBER,
        0.0,
        100.0,
        computable=Range(0.0, 1e6, "0 or more"),
        checkpoint="temperature",
        gguf="temp",
    ),
    SamplingField(
        "top_p",
        Form.NUMBER,
        0.0,
        1.0,
        computable=Range(ABOVE_ZERO, 1.0, "above 0 and at most 1"),
        checkpoint="top_p",
        least_default=1e-6,
        gguf="top_p",
    ),
    SamplingField("top_k", Form.WHOLE, 0, 2**63 - 1, checkpoint="top_k", gguf="top_k"),
    SamplingField(
        "min_p", Form.NUMBER, 0.0, 1.0, computable=Range(0.0, 1.0, "from 0 to 1"), checkpoint="min_p", gguf="min_p"
    ),
    SamplingField("seed", Form.WHOLE, -(2**63), 2**64 - 1, is_required=True),  # 64 bits, with a sign or without
    SamplingField(
        "repetition_penalty",
        Form.NUMBER,
        0.0,
        10.0,
        computable=Range(ABOVE_ZERO, FINITE, "above 0 and finite"),
        checkpoint="repetition_penalty",
        least_default=0.01,
        gguf="penalty_repeat",
    ),
    SamplingField("frequency_penalty", Form.NUMBER, -2.0, 2.0),  # OpenAI's bounds
    SamplingField("presence_penalty", Form.NUMBER, -2.0, 2.0),
    SamplingField("logit_bias", Form.BIASES, -100.0, 100.0, max_entries=1024),
    SamplingField(
        "bad_words",
        Form.WORDS,
        max_entries=128,
        max_chars=256,
        wire_name="bad_word_ids",
        checkpoint="bad_words_ids",  # and suppress_tokens
    ),
    SamplingField("stop", Form.TEXTS, max_entries=16, max_chars=256, takes_one=True, checkpoint="stop_strings"),
    SamplingField("stop_token_ids", Form.TOKEN_IDS, max_entries=256),
    SamplingField("ignore_eos", Form.FLAG),
    SamplingField("include_stop", Form.FLAG, api_name="include_stop_str_in_output"),
    SamplingField("skip_special_tokens", Form.FLAG),
    SamplingField("min_tokens", Form.WHOLE, 0, MOST_INT32, checkpoint="min_new_tokens"),
    # OpenAI's bound for chats; its completions stop at 5.
    SamplingField("logprobs", Form.WHOLE, 0, 20, is_in_every_body=False),
    SamplingField("prompt_logprobs", Form.WHOLE, 0, 20),
    SamplingField("grammar", Form.GRAMMAR, api_name="structured_outputs", max_chars=MAX_GRAMMAR_CHARS),
)
FIELD_BY_NAME: Mapping[str, SamplingField] = {field.name: field for field in FIELDS}
