"""Folds the pieces of a request to a response: numbered events, and the whole object. Knows no HTTP and no store.

A fold over the pieces: whoever has them, at any router, gets the same events under the same numbers, and the same
object, as often as it is asked for.

    created [queued] in_progress | per item: output_item.added, its parts and deltas, output_item.done | completed
                                                                                       incomplete, failed
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .....core.errors import Cancelled, TwostrokeError
from .....core.request import FinishReason, Request, TokenLogprobs
from ....requests.pieces import OutputDelta
from ...models import ServedModel
from ...openai_logprobs import LogprobWords
from ...openai_responses import PART_CHARS
from ...output import GivenCall
from ..one_choice import OneChoice
from .objects import call_item, error_of, head_of, message_item, name_of, reasoning_item, text_part, usage_of

Event = dict[str, Any]


class Shape(NamedTuple):
    """What a response repeats of its body, and what it shows."""

    said: dict[str, Any]
    created_s: int
    has_logprobs: bool

    @property
    def is_queued(self) -> bool:
        """Whether the request was answered before the response began."""
        return bool(self.said["background"])

    @property
    def has_summary(self) -> bool:
        """Whether reasoning is given as a summary, too."""
        return self.said["reasoning"]["summary"] is not None


@dataclass(slots=True)
class _Open:
    """The item that the answer is in."""

    kind: str  # content, reasoning
    item: dict[str, Any]
    texts: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)


class Reply:
    """One response, piece by piece."""

    def __init__(self, shape: Shape, request: Request, model: ServedModel) -> None:
        """`request`: one whose answer has one choice."""
        self._shape = shape
        self._head = head_of(shape.said, request, shape.created_s)
        self._choice = OneChoice(request, model)
        self._words = LogprobWords(model.token_texts)
        self._scores: deque[TokenLogprobs] = deque()  # of tokens whose text is withheld
        self._num_scored = 0
        self._shown: list[TokenLogprobs] = []  # of tokens whose text is there, and not in an item yet
        self._output: list[dict[str, Any]] = []
        self._open: _Open | None = None
        self._error: TwostrokeError | None = None
        self._status = "queued" if shape.is_queued else "in_progress"
        self._has_begun = False
        self.num_events = 0

    # ------------------------------------------------------------------ events

    def begin(self) -> Iterator[Event]:
        """Events before the first piece."""
        yield self._event("response.created", response=self.whole())
        if self._shape.is_queued:
            yield self._event("response.queued", response=self.whole())
        else:
            yield from self._run()

    def take(self, piece: OutputDelta) -> Iterator[Event]:
        """Events of a piece. The iterator must be read to its end."""
        yield from self._run()
        parts = self._choice.parts(piece)
        self._show(piece)
        for part in parts:
            scores, self._shown = self._shown, []
            if part.content:
                yield from self._say("content", part.content, [self._words.chat(one) for one in scores])
            elif part.reasoning:
                yield from self._say("reasoning", part.reasoning, [])
            for call in part.calls:
                yield from self._call(call)

    def end(self) -> Iterator[Event]:
        """Events after the last piece."""
        yield from self._run()
        is_cut = self._choice.reason is FinishReason.LENGTH
        yield from self._close("incomplete" if is_cut else "completed")
        if not self._output:
            yield from self._say("content", "", [])
            yield from self._close("incomplete" if is_cut else "completed")
        self._status = "incomplete" if is_cut else "completed"
        yield self._event(f"response.{self._status}", response=self.whole())

    def fail(self, error: TwostrokeError) -> Iterator[Event]:
        """The last event of a response that failed, or was cancelled."""
        yield from self._close("incomplete")
        self._error = error
        self._status = "cancelled" if isinstance(error, Cancelled) else "failed"
        yield self._event("response.failed", response=self.whole())

    def whole(self) -> dict[str, Any]:
        """The response as it is now."""
        is_failed = self._status == "failed" and self._error is not None
        cut = {"reason": "max_output_tokens"} if self._status == "incomplete" else None
        return {
            **self._head,
            "status": self._status,
            "error": error_of(self._error) if is_failed and self._error else None,
            "incomplete_details": cut,
            "output": [*self._output, *self._under_way()],
            "usage": usage_of(self._choice.usage, self._choice.reasoning_tokens),
        }

    # ------------------------------------------------------------------ details

    def _event(self, kind: str, **more: Any) -> Event:
        number = self.num_events
        self.num_events += 1
        return {"type": kind, "sequence_number": number, **more}

    def _run(self) -> Iterator[Event]:
        if not self._has_begun:
            self._has_begun, self._status = True, "in_progress"
            yield self._event("response.in_progress", response=self.whole())

    def _show(self, piece: OutputDelta) -> None:
        """Note the logprobs of tokens whose text has come now: they go with the next content."""
        if not self._shape.has_logprobs:
            return
        self._scores += piece.logprobs
        while self._scores and self._num_scored < piece.num_shown:
            self._shown.append(self._scores.popleft())
            self._num_scored += 1

    def _place(self, **more: Any) -> dict[str, Any]:
        """Names of the open item, for its events."""
        assert self._open is not None
        return {"item_id": self._open.item["id"], "output_index": len(self._output), **more}

    def _say(self, kind: str, text: str, scores: list[dict[str, Any]]) -> Iterator[Event]:
        if self._open is None or self._open.kind != kind:
            yield from self._close("completed")
            yield from self._start(kind)
        assert self._open is not None
        self._open.texts.append(text)
        self._open.logprobs += scores
        if kind == "content":
            at = self._place(content_index=0)
            yield self._event("response.output_text.delta", **at, delta=text, logprobs=scores)
            return
        yield self._event("response.reasoning_text.delta", **self._place(content_index=0), delta=text)
        if self._shape.has_summary:
            yield self._event("response.reasoning_summary_text.delta", **self._place(summary_index=0), delta=text)

    def _start(self, kind: str) -> Iterator[Event]:
        place = len(self._output)
        if kind == "content":
            item, part = message_item(self._name("msg", place)), text_part("", [])
        else:
            item, part = reasoning_item(self._name("rs", place)), _thought("")
        self._open = _Open(kind, item)
        yield self._event("response.output_item.added", output_index=place, item=dict(item))
        yield self._event("response.content_part.added", **self._place(content_index=0), part=part)
        if kind == "reasoning" and self._shape.has_summary:
            at = self._place(summary_index=0)
            yield self._event("response.reasoning_summary_part.added", **at, part=_summary(""))

    def _close(self, status: str) -> Iterator[Event]:
        if self._open is None:
            return
        text, at = "".join(self._open.texts), self._place(content_index=0)
        (item,) = self._under_way()
        item["status"] = status
        if self._open.kind == "content":
            yield self._event("response.output_text.done", **at, text=text, logprobs=self._open.logprobs)
        else:
            yield self._event("response.reasoning_text.done", **at, text=text)
        yield self._event("response.content_part.done", **at, part=item["content"][0])
        if item.get("summary"):
            by_summary = self._place(summary_index=0)
            yield self._event("response.reasoning_summary_text.done", **by_summary, text=text)
            yield self._event("response.reasoning_summary_part.done", **by_summary, part=_summary(text))
        yield from self._done(item)

    def _done(self, item: dict[str, Any]) -> Iterator[Event]:
        place = len(self._output)
        self._output.append(item)
        self._open = None
        yield self._event("response.output_item.done", output_index=place, item=item)

    def _call(self, call: GivenCall) -> Iterator[Event]:
        """A call, which comes whole; its arguments in parts of a bounded size."""
        yield from self._close("completed")
        place = len(self._output)
        item = call_item(self._name("fc", place), call.id, call.name)
        at = {"item_id": item["id"], "output_index": place}
        yield self._event("response.output_item.added", output_index=place, item=dict(item))
        for start in range(0, len(call.arguments), PART_CHARS):
            part = call.arguments[start : start + PART_CHARS]
            yield self._event("response.function_call_arguments.delta", **at, delta=part)
        whole = {"name": call.name, "arguments": call.arguments}
        yield self._event("response.function_call_arguments.done", **at, **whole)
        yield from self._done({**item, **whole, "status": "completed"})

    def _under_way(self) -> list[dict[str, Any]]:
        """The open item with its text so far."""
        if self._open is None:
            return []
        text = "".join(self._open.texts)
        if self._open.kind == "content":
            return [{**self._open.item, "content": [text_part(text, list(self._open.logprobs))]}]
        summary = [_summary(text)] if self._shape.has_summary else []
        return [{**self._open.item, "content": [_thought(text)], "summary": summary}]

    def _name(self, prefix: str, place: int) -> str:
        return name_of(prefix, self._head["id"], place)


def _thought(text: str) -> dict[str, str]:
    return {"type": "reasoning_text", "text": text}


def _summary(text: str) -> dict[str, str]:
    return {"type": "summary_text", "text": text}
