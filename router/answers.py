"""OpenAI's words for what comes back: whole answers and chunks, with logprobs. Knows no HTTP.

`text_offset` counts characters of the choice's own text, the echo included (text/places.py says where a token is).

A token's logprob is given out with the text that it is part of: what may be the beginning of a stop string is withheld
with its logprobs, and what a stop string cut off, or an end-of-sequence token, has none here. (The SDK's are one per
token id, these included.) Of a token that was cut in two the logprob is there.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..core.errors import TwostrokeError
from ..core.request import Request, TokenLogprobs
from ..text.places import TokenPlaces
from ..text.token_text import TokenTexts
from .echo import Echo
from .models import ServedModel
from .pieces import Piece, Usage


class Wants(NamedTuple):
    """What of an answer a body asked for beside the text."""

    logprobs: int | None = None  # of generated tokens, with so many alternatives
    prompt_logprobs: int | None = None  # vLLM's extra
    echo: Echo | None = None  # the prompt, to stand before the answer; completions only


def error_body(error: TwostrokeError) -> dict[str, Any]:
    """`{"error": {...}}` as the official clients read it."""
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


def usage_body(usage: Usage) -> dict[str, Any]:
    """Token counts; cached prompt tokens where OpenAI puts them."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


@dataclass(slots=True)
class _Choice:
    """One choice as far as it came."""

    places: TokenPlaces  # in its text
    text: str = ""
    reason: str | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # given out, or to be given out in one
    waiting: deque[TokenLogprobs] = field(default_factory=deque)  # of tokens whose text is withheld
    num_shown: int = 0
    has_begun: bool = False

    def add(self, piece: Piece) -> list[TokenLogprobs]:
        """Take a piece in; the logprobs that its text sets free."""
        self.text += piece.text
        self.waiting += piece.logprobs
        if piece.finish_reason is not None:
            self.reason = piece.finish_reason.value
        fresh = []
        while self.waiting and self.num_shown < piece.num_shown:
            fresh.append(self.waiting.popleft())
            self.num_shown += 1
        return fresh


class Answer:
    """Builds the objects of one request's answer from its pieces."""

    def __init__(self, head: dict[str, Any], request: Request, model: ServedModel, wants: Wants) -> None:
        """`head` has id, object, created and model."""
        self.head = head
        self._request = request
        self._words = LogprobWords(model.token_texts)
        self._wants = wants
        self._echo_text = wants.echo.text if wants.echo else ""
        skip, start = request.sampling.skip_special_tokens, len(self._echo_text)
        self._choices = [
            _Choice(TokenPlaces(model.tokenizer, skip, request.prompt_ids, start)) for _ in range(request.num_choices)
        ]
        self._prompt: tuple[TokenLogprobs, ...] = ()
        self._usage: Usage | None = None

    # ------------------------------------------------------------------ in one

    def add(self, piece: Piece) -> None:
        """Take a piece of a whole answer."""
        choice = self._choices[piece.choice]
        choice.logprobs += choice.add(piece)
        self._prompt = piece.prompt_logprobs or self._prompt
        self._usage = piece.usage or self._usage

    def whole(self) -> dict[str, Any]:
        """The response, after the last piece."""
        choices = [self._whole_choice(index, choice) for index, choice in enumerate(self._choices)]
        answer = self.head | {"choices": choices, "usage": usage_body(self._usage) if self._usage else None}
        if self._request.is_chat and self._wants.prompt_logprobs is not None:
            answer["prompt_logprobs"] = self._words.prompt(self._prompt, self._wants.prompt_logprobs)
        return answer

    def _whole_choice(self, index: int, choice: _Choice) -> dict[str, Any]:
        logprobs = self._logprobs(choice, choice.logprobs, is_first=True)
        said: dict[str, Any] = {"index": index, "finish_reason": choice.reason, "logprobs": logprobs}
        if self._request.is_chat:
            return said | {"message": {"role": "assistant", "content": choice.text, "refusal": None}}
        if self._wants.prompt_logprobs is not None:
            said["prompt_logprobs"] = self._words.prompt(self._prompt, self._wants.prompt_logprobs)
        return said | {"text": self._echo_text + choice.text}

    # ------------------------------------------------------------------ in chunks

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """One streamed chunk of one choice; the choice's first carries the role, or the echo."""
        choice = self._choices[piece.choice]
        fresh = choice.add(piece)
        self._prompt = piece.prompt_logprobs or self._prompt
        is_first, choice.has_begun = not choice.has_begun, True
        reason = piece.finish_reason.value if piece.finish_reason else None
        logprobs = self._logprobs(choice, fresh, is_first=is_first)
        said: dict[str, Any] = {"index": piece.choice, "finish_reason": reason, "logprobs": logprobs}
        if self._request.is_chat:
            role = {"role": "assistant"} if is_first else {}
            said["delta"] = role | ({"content": piece.text} if piece.text or is_first else {})
        else:
            said["text"] = (self._echo_text if is_first else "") + piece.text
        return self.head | {"choices": [said]}

    def _logprobs(self, choice: _Choice, fresh: list[TokenLogprobs], *, is_first: bool) -> dict[str, Any] | None:
        """What stands under `logprobs`; None: not asked for, or nothing of it here."""
        num_top = self._wants.logprobs
        if num_top is None:
            return None
        if self._request.is_chat:
            return {"content": [self._words.chat(one) for one in fresh], "refusal": None} if fresh else None
        told: list[tuple[int, TokenLogprobs | None]] = [(one.token_id, one) for one in fresh]
        places = choice.places.of([one.token_id for one in fresh])
        if is_first and self._wants.echo is not None:
            prompt_ids = self._request.prompt_ids
            told = [*itertools.zip_longest(prompt_ids, (None, *self._prompt)[: len(prompt_ids)]), *told]
            places = [*self._wants.echo.places, *places]
        return self._words.completion(told, num_top, places) if told else None


class LogprobWords:
    """Logprobs in the words of OpenAI's two interfaces and of vLLM's extra."""

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts

    def chat(self, one: TokenLogprobs) -> dict[str, Any]:
        """An entry of a chat's `logprobs.content`."""
        top = [self._entry(token_id, logprob) for token_id, logprob in one.top]
        return self._entry(one.token_id, one.logprob) | {"top_logprobs": top}

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        text, raw = self._texts.of(token_id)
        return {"token": text, "logprob": logprob, "bytes": list(raw)}

    def completion(
        self, told: Sequence[tuple[int, TokenLogprobs | None]], num_top: int, places: list[int]
    ) -> dict[str, Any]:
        """A completion's `logprobs`. `told`: token ids, each with what is known of it; `places`: of each in the text.

        The alternatives hold the token itself too, so there may be one more than asked for.
        """
        return {
            "tokens": [self._texts.of(token_id).text for token_id, _ in told],
            "token_logprobs": [one and one.logprob for _, one in told],
            "top_logprobs": [one and self._alternatives(one, num_top) for _, one in told],
            "text_offset": places,
        }

    def _alternatives(self, one: TokenLogprobs, num_top: int) -> dict[str, float]:
        named: dict[str, float] = {}
        for token_id, logprob in (*one.top[:num_top], (one.token_id, one.logprob)):
            named.setdefault(self._texts.of(token_id).text, logprob)
        return named

    def prompt(self, prompt: tuple[TokenLogprobs, ...], num_top: int) -> list[dict[str, Any] | None]:
        """vLLM's `prompt_logprobs`: per prompt token what is known of it and its alternatives; nothing of the first."""
        return [None, *({**self._ranked(one, num_top)} for one in prompt)]

    def _ranked(self, one: TokenLogprobs, num_top: int) -> dict[str, Any]:
        ranked = [(token_id, logprob, rank) for rank, (token_id, logprob) in enumerate(one.top[:num_top], 1)]
        if one.rank > num_top:
            ranked.insert(0, (one.token_id, one.logprob, one.rank))
        return {
            str(token_id): {"logprob": logprob, "rank": rank, "decoded_token": self._texts.of(token_id).text}
            for token_id, logprob, rank in ranked
        }
