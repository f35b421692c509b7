"""Conversion of results to OpenAI responses: whole answers and chunks, with logprobs. Knows no HTTP.

`text_offset` counts characters of the choice's own text, the echo included (text/places.py computes the offsets).

A token's logprob is returned with the text of the token. Text that may be the beginning of a stop string is withheld
with its logprobs. Tokens that a stop string cut off, and end-of-sequence tokens, have no logprob here. (The SDK returns
one per token id, these included.) A token that a stop string cut in two has its logprob.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from ...core.errors import TwostrokeError
from ...core.request import FinishReason, Request, TokenLogprobs
from ...kv.messages import logprobs_from_wire
from ...protos import common_pb2
from ...text.places import TokenPlaces
from ...text.token_text import TokenTexts
from ..requests.pieces import OutputDelta, TokenUsage
from .echo import Echo
from .models import ServedModel


class Wants(NamedTuple):
    """Parts of an answer that a body asked for, beside the text."""

    logprobs: int | None = None  # number of alternatives per generated token
    prompt_logprobs: int | None = None  # the same per prompt token (vLLM's extension)
    echo: tuple[Echo, ...] | None = None  # each prompt, to precede its answers; completions only
    token_ids: bool = False  # ids of prompts and answers, beside their texts
    tokens_as_ids: bool = False  # logprobs name tokens "token_id:7"
    usage_so_far: bool = False  # in every chunk
    prompt_only: bool = False  # return no generated tokens


def error_body(error: TwostrokeError) -> dict[str, Any]:
    """Body of an error in OpenAI's format: `{"error": {...}}`."""
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


def usage_body(usage: TokenUsage) -> dict[str, Any]:
    """Token counts in OpenAI's format."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def _without_output(piece: OutputDelta) -> OutputDelta:
    """A piece without its generated tokens, for echo-only bodies. Workers generate at least one token."""
    usage = piece.usage and replace(piece.usage, completion_tokens=0)
    reason = piece.finish_reason and FinishReason.LENGTH
    return replace(piece, token_ids=(), text="", logprobs=(), num_shown=0, usage=usage, finish_reason=reason)


@dataclass(slots=True)
class _Prompt:
    """One prompt of a request, with its echo and scores."""

    ids: tuple[int, ...]
    echo: Echo | None
    scores: tuple[common_pb2.TokenLogprobs, ...] = ()

    @property
    def logprobs(self) -> tuple[TokenLogprobs, ...]:
        """Logprobs of its tokens, from the second on."""
        return logprobs_from_wire(self.scores)

    @property
    def echo_text(self) -> str:
        """Text that precedes an answer to it."""
        return self.echo.text if self.echo else ""


@dataclass(slots=True)
class _Choice:
    """State of one choice so far."""

    prompt: _Prompt
    places: TokenPlaces  # offsets of tokens in its text
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    reason: str | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # collected for a whole answer
    waiting: deque[TokenLogprobs] = field(default_factory=deque)  # of tokens whose text is withheld
    num_shown: int = 0
    has_begun: bool = False

    def add(self, piece: OutputDelta) -> list[TokenLogprobs]:
        """Add a piece; returns the logprobs of tokens whose text is complete now."""
        self.text += piece.text
        self.token_ids += piece.token_ids
        self.prompt.scores = piece.prompt_scores or self.prompt.scores
        self.waiting += piece.logprobs
        if piece.finish_reason is not None:
            self.reason = piece.finish_reason.value
        fresh = []
        while self.waiting and self.num_shown < piece.num_shown:
            fresh.append(self.waiting.popleft())
            self.num_shown += 1
        return fresh


class Answer:
    """Builds the response objects of one answer from its pieces, for one or more prompts with `n` choices each."""

    def __init__(self, head: dict[str, Any], requests: Sequence[Request], model: ServedModel, wants: Wants) -> None:
        """`head` has id, object, created and model."""
        self.head = head
        self._is_chat = requests[0].is_chat
        self._words = LogprobWords(model.token_texts, as_ids=wants.tokens_as_ids)
        self._wants = wants
        echoes = wants.echo or itertools.repeat(None)
        self._prompts = [_Prompt(request.prompt_ids, echo) for request, echo in zip(requests, echoes, strict=False)]
        skip, tokenizer = requests[0].sampling.skip_special_tokens, model.tokenizer
        self._choices = [
            _Choice(prompt, TokenPlaces(tokenizer, skip, prompt.ids, len(prompt.echo_text)))
            for prompt in self._prompts
            for _ in range(requests[0].num_choices)
        ]
        self._num_generated = 0
        self._usage: TokenUsage | None = None

    # ------------------------------------------------------------------ whole answers

    def add(self, piece: OutputDelta) -> None:
        """Add a piece to a whole answer."""
        _, choice, fresh = self._take(piece)
        choice.logprobs += fresh

    @property
    def has_scores(self) -> bool:
        """True if scores of a prompt arrived."""
        return any(choice.prompt.scores for choice in self._choices)

    def whole(self) -> dict[str, Any]:
        """The response, after the last piece."""
        choices = [self._whole_choice(index, choice) for index, choice in enumerate(self._choices)]
        answer = self.head | {"choices": choices, "usage": usage_body(self._usage) if self._usage else None}
        if self._is_chat and self._wants.prompt_logprobs is not None:
            answer["prompt_logprobs"] = self._prompt_logprobs(self._choices[0])
        if self._is_chat and self._wants.token_ids:
            answer["prompt_token_ids"] = self._prompts[0].ids
        return answer

    def _whole_choice(self, index: int, choice: _Choice) -> dict[str, Any]:
        logprobs = self._logprobs(choice, choice.logprobs, is_first=True)
        said: dict[str, Any] = {"index": index, "finish_reason": choice.reason, "logprobs": logprobs}
        if self._wants.token_ids:
            said["token_ids"] = choice.token_ids
        if self._is_chat:
            return said | {"message": {"role": "assistant", "content": choice.text, "refusal": None}}
        if self._wants.token_ids:
            said["prompt_token_ids"] = choice.prompt.ids
        if self._wants.prompt_logprobs is not None:
            said["prompt_logprobs"] = self._prompt_logprobs(choice)
        return said | {"text": choice.prompt.echo_text + choice.text}

    def _prompt_logprobs(self, choice: _Choice) -> list[dict[str, Any] | None]:
        return self._words.prompt(choice.prompt.logprobs, self._wants.prompt_logprobs or 0)

    # ------------------------------------------------------------------ chunks

    def chunk(self, piece: OutputDelta) -> dict[str, Any]:
        """Build one streamed chunk of one choice; the choice's first one has the role, or the echo."""
        piece, choice, fresh = self._take(piece)
        is_first, choice.has_begun = not choice.has_begun, True
        reason = piece.finish_reason.value if piece.finish_reason else None
        logprobs = self._logprobs(choice, fresh, is_first=is_first)
        said: dict[str, Any] = {"index": piece.choice, "finish_reason": reason, "logprobs": logprobs}
        chunk = self.head | {"choices": [said]}
        if self._wants.token_ids:
            said["token_ids"] = piece.token_ids
            if is_first:
                (chunk if self._is_chat else said)["prompt_token_ids"] = choice.prompt.ids
        if self._is_chat:
            role = {"role": "assistant"} if is_first else {}
            said["delta"] = role | ({"content": piece.text} if piece.text or is_first else {})
        else:
            said["text"] = (choice.prompt.echo_text if is_first else "") + piece.text
        if self._wants.usage_so_far:
            chunk["usage"] = self._usage_so_far()
        return chunk

    def last_chunk(self) -> dict[str, Any] | None:
        """The chunk after all choices, with the usage; None: the stream did not reach its end."""
        return None if self._usage is None else self.head | {"choices": [], "usage": usage_body(self._usage)}

    def _usage_so_far(self) -> dict[str, Any]:
        """Token counts of all choices together, without cached tokens, which are known at the end only."""
        prompt = sum(len(prompt.ids) for prompt in self._prompts)
        counts = {"prompt_tokens": prompt, "completion_tokens": self._num_generated}
        return counts | {"total_tokens": prompt + self._num_generated}

    # ------------------------------------------------------------------ both

    def _take(self, piece: OutputDelta) -> tuple[OutputDelta, _Choice, list[TokenLogprobs]]:
        """Add a piece; returns the piece to show, its choice, and the logprobs that can be returned now."""
        if self._wants.prompt_only:
            piece = _without_output(piece)
        choice = self._choices[piece.choice]
        fresh = choice.add(piece)
        self._num_generated += len(piece.token_ids)
        self._usage = piece.usage or self._usage
        return piece, choice, fresh

    def _logprobs(self, choice: _Choice, fresh: list[TokenLogprobs], *, is_first: bool) -> dict[str, Any] | None:
        """Value of `logprobs`; None: not asked for, or none in this part."""
        num_top = self._wants.logprobs
        if num_top is None:
            return None
        if self._is_chat:
            return {"content": [self._words.chat(one) for one in fresh], "refusal": None} if fresh else None
        told: list[tuple[int, TokenLogprobs | None]] = [(one.token_id, one) for one in fresh]
        places = choice.places.of([one.token_id for one in fresh])
        prompt = choice.prompt
        if is_first and prompt.echo is not None:
            told = [*itertools.zip_longest(prompt.ids, (None, *prompt.logprobs)[: len(prompt.ids)]), *told]
            places = [*prompt.echo.places, *places]
        return self._words.completion(told, num_top, places) if told else None


class LogprobWords:
    """Logprobs in the formats of OpenAI's two APIs and of vLLM's extension."""

    def __init__(self, texts: TokenTexts, *, as_ids: bool = False) -> None:
        """`as_ids`: name tokens "token_id:7", because texts are not unique. Bytes and offsets do not change."""
        self._texts = texts
        self._as_ids = as_ids

    def _name(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._as_ids else self._texts.of(token_id).text

    def chat(self, one: TokenLogprobs) -> dict[str, Any]:
        """An entry of a chat's `logprobs.content`."""
        top = [self._entry(token_id, logprob) for token_id, logprob in one.top]
        return self._entry(one.token_id, one.logprob) | {"top_logprobs": top}

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {"token": self._name(token_id), "logprob": logprob, "bytes": list(self._texts.of(token_id).raw)}

    def completion(
        self, told: Sequence[tuple[int, TokenLogprobs | None]], num_top: int, places: list[int]
    ) -> dict[str, Any]:
        """A completion's `logprobs`. `told`: token ids with their logprobs or None; `places`: their text offsets.

        The alternatives include the token itself, so there may be one more than asked for.
        """
        return {
            "tokens": [self._name(token_id) for token_id, _ in told],
            "token_logprobs": [one and one.logprob for _, one in told],
            "top_logprobs": [one and self._alternatives(one, num_top) for _, one in told],
            "text_offset": places,
        }

    def _alternatives(self, one: TokenLogprobs, num_top: int) -> dict[str, float]:
        named: dict[str, float] = {}
        for token_id, logprob in (*one.top[:num_top], (one.token_id, one.logprob)):
            named.setdefault(self._name(token_id), logprob)
        return named

    def prompt(self, prompt: tuple[TokenLogprobs, ...], num_top: int) -> list[dict[str, Any] | None]:
        """vLLM's `prompt_logprobs`: per prompt token its logprob and alternatives; None for the first."""
        return [None, *({**self._ranked(one, num_top)} for one in prompt)]

    def _ranked(self, one: TokenLogprobs, num_top: int) -> dict[str, Any]:
        ranked = [(token_id, logprob, rank) for rank, (token_id, logprob) in enumerate(one.top[:num_top], 1)]
        if one.rank > num_top:
            ranked.insert(0, (one.token_id, one.logprob, one.rank))
        return {
            str(token_id): {"logprob": logprob, "rank": rank, "decoded_token": self._texts.of(token_id).text}
            for token_id, logprob, rank in ranked
        }
