"""Conversion of one choice to Ollama's objects: one for a whole answer, one per piece of a stream. Knows no HTTP."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from ....core.request import FinishReason
from ..output import GivenCall, ParsedDelta
from .one_choice import OneChoice

_NS = 1_000_000_000


class Reply:
    """Builds the objects of an answer. Use `add` and `whole`, or `part` and `last`."""

    def __init__(
        self,
        model: str,
        choice: OneChoice,
        num_prompt: int,
        arrived_s: float,
        now_s: Callable[[], float],
        *,
        is_chat: bool,
        shows_thinking: bool,
    ) -> None:
        """`model`: the name that the client gave. `num_prompt`: tokens. `arrived_s`: of the request, on `now_s`."""
        self._model = model
        self._choice = choice
        self._num_prompt = num_prompt
        self._arrived_s, self._now_s = arrived_s, now_s
        self._first_s: float | None = None  # time of the first piece
        self._is_chat, self._shows_thinking = is_chat, shows_thinking
        self._so_far = ParsedDelta()

    def add(self, parsed: ParsedDelta) -> None:
        """Add what a piece gave."""
        self._saw_a_piece()
        so_far = self._so_far
        self._so_far = ParsedDelta(
            so_far.content + parsed.content, so_far.reasoning + parsed.reasoning, so_far.calls + parsed.calls
        )

    def whole(self) -> dict[str, Any]:
        """The answer, after the last piece."""
        return {**self._head(), **self._said(self._so_far), **self._end()}

    def part(self, parsed: ParsedDelta) -> dict[str, Any] | None:
        """The object of a piece; None: it says nothing."""
        self._saw_a_piece()
        says = parsed.content or parsed.calls or (parsed.reasoning and self._shows_thinking)
        return {**self._head(), **self._said(parsed), "done": False} if says else None

    def last(self) -> dict[str, Any]:
        """The last object of a stream."""
        return {**self._head(), **self._said(ParsedDelta()), **self._end()}

    def _saw_a_piece(self) -> None:
        self._first_s = self._now_s() if self._first_s is None else self._first_s

    def _head(self) -> dict[str, Any]:
        return {"model": self._model, "created_at": datetime.now(UTC).isoformat()}

    def _said(self, parsed: ParsedDelta) -> dict[str, Any]:
        thinking = {"thinking": parsed.reasoning} if parsed.reasoning and self._shows_thinking else {}
        if not self._is_chat:
            return {"response": parsed.content, **thinking}
        calls = {"tool_calls": list(map(_call, parsed.calls))} if parsed.calls else {}
        return {"message": {"role": "assistant", "content": parsed.content, **thinking, **calls}}

    def _end(self) -> dict[str, Any]:
        now_s, usage = self._now_s(), self._choice.usage
        first_s = now_s if self._first_s is None else self._first_s
        return {
            "done": True,
            "done_reason": "length" if self._choice.reason is FinishReason.LENGTH else "stop",
            "total_duration": round((now_s - self._arrived_s) * _NS),
            "load_duration": 0,
            "prompt_eval_count": self._num_prompt,
            "prompt_eval_duration": round((first_s - self._arrived_s) * _NS),
            "eval_count": self._choice.num_tokens if usage is None else usage.completion_tokens,
            "eval_duration": round((now_s - first_s) * _NS),
        }


def loaded(model: str, *, is_chat: bool) -> dict[str, Any]:
    """The answer to a body without a prompt, which asks for the model to be loaded. Served models always are."""
    said = {"message": {"role": "assistant", "content": ""}} if is_chat else {"response": ""}
    end = {"done": True, "done_reason": "load"}
    return {"model": model, "created_at": datetime.now(UTC).isoformat(), **said, **end}


def _call(call: GivenCall) -> dict[str, Any]:
    return {"function": {"index": call.place, "name": call.name, "arguments": json.loads(call.arguments)}}
