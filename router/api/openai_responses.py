"""Conversion of results to OpenAI responses: whole answers and chunks, with logprobs. Knows no HTTP.

`text_offset` counts characters of the choice's own text, the echo included (text/places.py computes the offsets).

A token's logprob is returned with the text of the token. Text that may be the beginning of a stop string is withheld
with its logprobs. Tokens that a stop string cut off, and end-of-sequence tokens, have no logprob here. (The SDK returns
one per token id, these included.) A token that a stop string cut in two has its logprob.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from ...core.errors import TwostrokeError
from ...core.request import FinishReason, Request, TokenLogprobs
from ...kv.messages import logprobs_from_wire
from ...protos import common_pb2
from ...text.places import TokenPlaces
from ..requests.pieces import OutputDelta, TokenUsage
from .echo import Echo
from .models import ServedModel
from .openai_logprobs import LogprobWords
from .output import ChoiceOutput, GivenCall, ParsedDelta

PART_CHARS = 8192  # of a call's arguments in one chunk


class Wants(NamedTuple):
    """Parts of an answer that a body asked for, beside the text."""

    logprobs: int | None = None  # number of alternatives per generated token
    prompt_logprobs: int | None = None  # the same per prompt token (vLLM's extension)
    echo: tuple[Echo, ...] | None = None  # each prompt, to precede its answers; completions only
    token_ids: bool = False  # ids of prompts and answers, beside their texts
    tokens_as_ids: bool = False  # logprobs name tokens "token_id:7"
    usage_so_far: bool = False  # in every chunk
    prompt_only: bool = False  # return no generated tokens
    reasoning: bool = True


def error_body(error: TwostrokeError) -> dict[str, Any]:
    """Body of an error in OpenAI's format: `{"error": {...}}`."""
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


def usage_body(usage: TokenUsage, reasoning_tokens: int | None = None) -> dict[str, Any]:
    """Token counts in OpenAI's format. `reasoning_tokens` None: the answer was not searched for reasoning."""
    counts: dict[str, Any] = {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
    details = {} if reasoning_tokens is None else {"reasoning_tokens": reasoning_tokens}
    if usage.draft_tokens:
        details["accepted_prediction_tokens"] = usage.accepted_tokens
        details["rejected_prediction_tokens"] = usage.draft_tokens - usage.accepted_tokens
    return counts | ({"completion_tokens_details": details} if details else {})


def call_body(call: GivenCall) -> dict[str, Any]:
    """A tool call in OpenAI's format."""
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def call_deltas(call: GivenCall) -> Iterator[dict[str, Any]]:
    """A tool call as deltas of a stream: id and name first, then its arguments in parts."""
    begun = {"index": call.place, **call_body(call._replace(arguments=""))}
    yield {"tool_calls": [begun]}
    for start in range(0, len(call.arguments), PART_CHARS):
        part = call.arguments[start : start + PART_CHARS]
        yield {"tool_calls": [{"index": call.place, "function": {"arguments": part}}]}


def reasoning_body(reasoning: str) -> dict[str, Any]:
    """Reasoning under both of its names; empty if there is none."""
    return {"reasoning": reasoning, "reasoning_content": reasoning} if reasoning else {}


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
    output: ChoiceOutput | None  # None: the answer is its text
    text: str = ""  # content
    reasoning: str = ""
    calls: list[GivenCall] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    reason: str | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # collected for a whole answer
    waiting: deque[TokenLogprobs] = field(default_factory=deque)  # of tokens whose text is withheld
    num_shown: int = 0
    has_begun: bool = False

    def parsed(self, piece: OutputDelta) -> ParsedDelta:
        """What a piece adds to content, reasoning and calls."""
        return ParsedDelta(piece.text) if self.output is None else self.output.take(piece)

    def add(self, piece: OutputDelta, parsed: ParsedDelta) -> list[TokenLogprobs]:
        """Add a piece; returns the logprobs of tokens whose text is complete now."""
        self.text += parsed.content
        self.reasoning += parsed.reasoning
        self.calls += parsed.calls
        self.token_ids += piece.token_ids
        self.prompt.scores = piece.prompt_scores or self.prompt.scores
        self.waiting += piece.logprobs
        reason = piece.finish_reason if self.output is None else self.output.reason(piece.finish_reason)
        if reason is not None:
            self.reason = reason.value
        fresh = []
        while self.waiting and self.num_shown < piece.num_shown:
            fresh.append(self.waiting.popleft())
            self.num_shown += 1
        return fresh

    @property
    def message(self) -> dict[str, Any]:
        """The message of a chat's whole answer. Without text its content is null beside calls or reasoning."""
        content = self.text or (None if self.calls or self.reasoning else "")
        calls = {"tool_calls": list(map(call_body, self.calls))} if self.calls else {}
        return {"role": "assistant", "content": content, "refusal": None, **reasoning_body(self.reasoning), **calls}


class _Taken(NamedTuple):
    """What a piece gives to show."""

    piece: OutputDelta
    parsed: ParsedDelta
    choice: _Choice
    fresh: list[TokenLogprobs]  # that can be returned now


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
            _Choice(
                prompt,
                TokenPlaces(tokenizer, skip, prompt.ids, len(prompt.echo_text)),
                ChoiceOutput(request, choice, model) if request.answer is not None else None,
            )
            for prompt, request in zip(self._prompts, requests, strict=True)
            for choice in range(request.num_choices)
        ]
        self._num_generated = 0
        self._usage: TokenUsage | None = None

    # ------------------------------------------------------------------ whole answers

    def add(self, piece: OutputDelta) -> None:
        """Add a piece to a whole answer."""
        taken = self._take(piece)
        taken.choice.logprobs += taken.fresh

    @property
    def has_scores(self) -> bool:
        """True if scores of a prompt arrived."""
        return any(choice.prompt.scores for choice in self._choices)

    def whole(self) -> dict[str, Any]:
        """The response, after the last piece."""
        choices = [self._whole_choice(index, choice) for index, choice in enumerate(self._choices)]
        answer = self.head | {"choices": choices, "usage": self._usage_body()}
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
            return said | {"message": choice.message}
        if self._wants.token_ids:
            said["prompt_token_ids"] = choice.prompt.ids
        if self._wants.prompt_logprobs is not None:
            said["prompt_logprobs"] = self._prompt_logprobs(choice)
        return said | {"text": choice.prompt.echo_text + choice.text}

    def _prompt_logprobs(self, choice: _Choice) -> list[dict[str, Any] | None]:
        return self._words.prompt(choice.prompt.logprobs, self._wants.prompt_logprobs or 0)

    # ------------------------------------------------------------------ chunks

    def chunks(self, piece: OutputDelta) -> Iterator[dict[str, Any]]:
        """Build the streamed chunks of a piece of one choice: one, and for each tool call two or more.

        The choice's first one has the role, or the echo; the last one its finish reason.
        """
        piece, parsed, choice, fresh = self._take(piece)
        chunk = self._chunk(piece, parsed, choice, fresh)
        deltas = [delta for call in parsed.calls for delta in call_deltas(call)]
        reason = choice.reason if piece.finish_reason is not None else None
        chunk["choices"][0]["finish_reason"] = None if deltas else reason
        yield chunk
        for place, delta in enumerate(deltas, 1):
            said = {"index": piece.choice, "finish_reason": reason if place == len(deltas) else None, "logprobs": None}
            more = self.head | {"choices": [said | {"delta": delta}]}
            if self._wants.usage_so_far:
                more["usage"] = self._usage_so_far()
            yield more

    def chunk(self, piece: OutputDelta) -> dict[str, Any]:
        """All chunks of a piece in one, of streams that can be resumed where pieces end and nowhere else."""
        piece, parsed, choice, fresh = self._take(piece)
        chunk = self._chunk(piece, parsed, choice, fresh)
        said = chunk["choices"][0]
        if parsed.calls:
            said["delta"]["tool_calls"] = [{"index": call.place, **call_body(call)} for call in parsed.calls]
        said["finish_reason"] = choice.reason if piece.finish_reason is not None else None
        return chunk

    def _chunk(
        self, piece: OutputDelta, parsed: ParsedDelta, choice: _Choice, fresh: list[TokenLogprobs]
    ) -> dict[str, Any]:
        """The chunk of a piece without its tool calls and its finish reason."""
        is_first, choice.has_begun = not choice.has_begun, True
        logprobs = self._logprobs(choice, fresh, is_first=is_first)
        said: dict[str, Any] = {"index": piece.choice, "finish_reason": None, "logprobs": logprobs}
        chunk = self.head | {"choices": [said]}
        if self._wants.token_ids:
            said["token_ids"] = piece.token_ids
            if is_first:
                (chunk if self._is_chat else said)["prompt_token_ids"] = choice.prompt.ids
        if self._is_chat:
            role = {"role": "assistant"} if is_first else {}
            content = {"content": parsed.content} if parsed.content or is_first else {}
            said["delta"] = role | content | reasoning_body(parsed.reasoning)
        else:
            said["text"] = (choice.prompt.echo_text if is_first else "") + piece.text
        if self._wants.usage_so_far:
            chunk["usage"] = self._usage_so_far()
        return chunk

    def last_chunk(self) -> dict[str, Any] | None:
        """The chunk after all choices, with the usage; None: the stream did not reach its end."""
        return None if self._usage is None else self.head | {"choices": [], "usage": self._usage_body()}

    def _usage_body(self) -> dict[str, Any] | None:
        outputs = [choice.output for choice in self._choices if choice.output is not None]
        reasoning = sum(output.reasoning_tokens for output in outputs) if outputs else None
        return usage_body(self._usage, reasoning) if self._usage else None

    def _usage_so_far(self) -> dict[str, Any]:
        """Token counts of all choices together, without cached tokens, which are known at the end only."""
        prompt = sum(len(prompt.ids) for prompt in self._prompts)
        counts = {"prompt_tokens": prompt, "completion_tokens": self._num_generated}
        return counts | {"total_tokens": prompt + self._num_generated}

    # ------------------------------------------------------------------ both

    def _take(self, piece: OutputDelta) -> _Taken:
        """Add a piece; returns what there is to show now."""
        if self._wants.prompt_only:
            piece = _without_output(piece)
        choice = self._choices[piece.choice]
        parsed = choice.parsed(piece)
        if not self._wants.reasoning:
            parsed = parsed._replace(reasoning="")
        fresh = choice.add(piece, parsed)
        self._num_generated += len(piece.token_ids)
        self._usage = piece.usage or self._usage
        return _Taken(piece, parsed, choice, fresh)

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
