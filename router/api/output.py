"""The output of one choice as the APIs give it out: content, reasoning and tool calls. Knows no protocol.

The parser is a fold over the choice's text (text/parsing/), so it does not matter which worker a piece came from.
"""

from __future__ import annotations

import hashlib
import re
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from ...core.request import FinishReason, Request
from ...text.parsing.parser import OutputParser
from ...text.parsing.source import Call, Event, Kind
from ...text.parsing.values import Tools
from ..requests.pieces import OutputDelta
from .models import ServedModel

_CALL_ID = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
_SHORT_ID_CHARS = 9  # Mistral's chat templates take no other length


class GivenCall(NamedTuple):
    """A tool call with its place in the choice, and its id."""

    place: int  # in its choice
    id: str
    name: str
    arguments: str  # text of a JSON object


class ParsedDelta(NamedTuple):
    """What one piece adds to a choice."""

    content: str = ""
    reasoning: str = ""
    calls: tuple[GivenCall, ...] = ()


_NOTHING = ParsedDelta()


def joined(parts: Sequence[ParsedDelta]) -> ParsedDelta:
    """Several parts as one, without the order of their kinds."""
    return ParsedDelta(
        "".join(part.content for part in parts),
        "".join(part.reasoning for part in parts),
        tuple(call for part in parts for call in part.calls),
    )


class ChoiceOutput:
    """Content, reasoning and calls of one choice, piece by piece."""

    def __init__(self, request: Request, choice: int, model: ServedModel) -> None:
        """The request must have an answer to parse (`request.answer`)."""
        assert request.answer is not None
        tools = request.answer.tools
        self._parser = OutputParser(model.parsers, request.answer.prompt_end, None if tools is None else Tools(tools))
        self._most_calls = None if request.answer.parallel else 1
        self._seed = f"{request.request_id}/{choice}"
        self._is_short = model.parsers.tools == "mistral"
        self._tokens = _TokenCount(model, request.sampling.skip_special_tokens)
        self._hidden = model.tokenizer.special_words if request.answer.hides_special_tokens else None
        self.num_calls = 0

    @property
    def reasoning_tokens(self) -> int:
        """Tokens of the reasoning so far."""
        return self._tokens.num_reasoning

    def take(self, piece: OutputDelta) -> ParsedDelta:
        """Add a piece; returns what is certain now."""
        return joined(self.parts(piece))

    def parts(self, piece: OutputDelta) -> list[ParsedDelta]:
        """The same in the order of the text, each part of one kind."""
        events = self._parser.push(piece.text)
        if piece.finish_reason is not None:
            events += self._parser.finish(is_cut=piece.finish_reason is not FinishReason.STOP)
        self._tokens.take(piece.token_ids, events)
        return [part for part in map(self._part, events) if part != _NOTHING]

    def reason(self, given: FinishReason | None) -> FinishReason | None:
        """The finish reason for clients: a choice with calls that stopped by itself stopped for them."""
        return FinishReason.TOOL_CALLS if given is FinishReason.STOP and self.num_calls else given

    def _part(self, event: Event) -> ParsedDelta:
        """What an event gives. A special token comes whole, so each event can be searched for it alone."""
        if event.call is not None:
            return ParsedDelta(calls=(self._given(event.call),)) if self._has_room() else _NOTHING
        text = event.text if self._hidden is None else self._hidden.sub("", event.text)
        if event.kind is Kind.REASONING:
            return ParsedDelta(reasoning=text)
        return ParsedDelta(text) if event.kind is Kind.CONTENT else _NOTHING

    def _has_room(self) -> bool:
        return self._most_calls is None or self.num_calls < self._most_calls

    def _given(self, call: Call) -> GivenCall:
        index = self.num_calls
        self.num_calls += 1
        if call.id is not None and _CALL_ID.fullmatch(call.id):
            call_id = call.id
        else:
            digest = hashlib.blake2b(
                f"{self._seed}/{index}".encode(), digest_size=12, person=b"twostroke-call"
            ).hexdigest()
            call_id = digest[:_SHORT_ID_CHARS] if self._is_short else f"call_{digest}"
        return GivenCall(index, call_id, call.name, call.arguments)


class _TokenCount:
    """Counts the tokens of reasoning: those that end within it, by the lengths of their texts in bytes."""

    def __init__(self, model: ServedModel, skips_special: bool) -> None:
        self._texts = model.token_texts
        self._without_text = model.tokenizer.special_ids if skips_special else frozenset()
        self._ends: deque[int] = deque()  # of tokens that no event covers yet
        self._end = 0  # of the tokens
        self._covered = 0  # by events
        self.num_reasoning = 0

    def take(self, token_ids: tuple[int, ...], events: list[Event]) -> None:
        """Add tokens, and the events of the text so far."""
        for token_id in token_ids:
            if token_id not in self._without_text:
                self._end += len(self._texts.of(token_id).raw)
            self._ends.append(self._end)
        for event in events:
            self._covered += len(event.raw.encode(errors="replace"))
            while self._ends and self._ends[0] <= self._covered:
                self._ends.popleft()
                self.num_reasoning += event.kind is Kind.REASONING
