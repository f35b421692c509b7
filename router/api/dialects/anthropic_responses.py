"""Conversion of one choice to Anthropic's message and to the events of its stream. Knows no HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from ....core.request import FinishReason
from ..openai_responses import PART_CHARS
from ..output import GivenCall, ParsedDelta
from .one_choice import OneChoice

_REASONS = {
    FinishReason.STOP: "end_turn",
    FinishReason.LENGTH: "max_tokens",
    FinishReason.TOOL_CALLS: "tool_use",
}


class Message:
    """Builds a message, whole or as events. Use one of the two."""

    def __init__(self, name: str, model: str, choice: OneChoice, num_prompt: int, *, shows_thinking: bool) -> None:
        """`name`: id of the message. `num_prompt`: tokens of the prompt."""
        self._head = {"id": name, "type": "message", "role": "assistant", "model": model}
        self._choice = choice
        self._num_prompt = num_prompt
        self._shows_thinking = shows_thinking
        self._blocks: list[dict[str, Any]] = []
        self._open: str | None = None  # kind of the block that the stream is in

    # ------------------------------------------------------------------ whole

    def add(self, parsed: ParsedDelta) -> None:
        """Add what a piece gave."""
        for kind, text in self._texts(parsed):
            if not self._blocks or self._blocks[-1]["type"] != kind:
                self._blocks.append(_begun(kind))
            self._blocks[-1][kind] += text
        self._blocks += [{**_begun_call(call), "input": json.loads(call.arguments)} for call in parsed.calls]

    def whole(self) -> dict[str, Any]:
        """The message, after the last piece."""
        return {**self._head, "content": self._blocks, **self._end(), "usage": self._usage()}

    # ------------------------------------------------------------------ events

    def begin(self) -> Iterator[dict[str, Any]]:
        """Events before the first piece."""
        usage = {"input_tokens": self._num_prompt, "output_tokens": 0}
        end = {"stop_reason": None, "stop_sequence": None}
        message: dict[str, Any] = {**self._head, "content": [], **end, "usage": usage}
        yield {"type": "message_start", "message": message}
        yield {"type": "ping"}

    def events(self, parsed: ParsedDelta) -> Iterator[dict[str, Any]]:
        """Events of a piece."""
        for kind, text in self._texts(parsed):
            if self._open != kind:
                yield from self._close()
                yield self._start(kind, _begun(kind))
            yield self._delta({"type": f"{kind}_delta", kind: text})
        for call in parsed.calls:
            yield from self._close()
            yield self._start("tool_use", {**_begun_call(call), "input": {}})
            for start in range(0, len(call.arguments), PART_CHARS):
                part = call.arguments[start : start + PART_CHARS]
                yield self._delta({"type": "input_json_delta", "partial_json": part})

    def end(self) -> Iterator[dict[str, Any]]:
        """Events after the last piece."""
        yield from self._close()
        yield {"type": "message_delta", "delta": self._end(), "usage": self._usage()}
        yield {"type": "message_stop"}

    # ------------------------------------------------------------------ details

    def _texts(self, parsed: ParsedDelta) -> Iterator[tuple[str, str]]:
        if parsed.reasoning and self._shows_thinking:
            yield "thinking", parsed.reasoning
        if parsed.content:
            yield "text", parsed.content

    def _start(self, kind: str, block: dict[str, Any]) -> dict[str, Any]:
        self._open = kind
        self._blocks.append({})  # counts them
        return {"type": "content_block_start", "index": len(self._blocks) - 1, "content_block": block}

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": len(self._blocks) - 1, "delta": delta}

    def _close(self) -> Iterator[dict[str, Any]]:
        if self._open is not None:
            self._open = None
            yield {"type": "content_block_stop", "index": len(self._blocks) - 1}

    def _end(self) -> dict[str, Any]:
        reason = None if self._choice.reason is None else _REASONS.get(self._choice.reason)
        stop = self._choice.stop
        if stop is not None and reason == "end_turn":
            reason = "stop_sequence"
        return {"stop_reason": reason, "stop_sequence": stop}

    def _usage(self) -> dict[str, Any]:
        """Token counts. Anthropic counts cached tokens of the prompt apart from the others."""
        usage = self._choice.usage
        prompt, cached = (self._num_prompt, 0) if usage is None else (usage.prompt_tokens, usage.cached_tokens)
        return {
            "input_tokens": prompt - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": self._choice.num_tokens if usage is None else usage.completion_tokens,
        }


def _begun(kind: str) -> dict[str, Any]:
    return {"type": kind, kind: "", **({"signature": ""} if kind == "thinking" else {})}


def _begun_call(call: GivenCall) -> dict[str, Any]:
    return {"type": "tool_use", "id": call.id, "name": call.name}
