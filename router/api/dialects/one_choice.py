"""Folds the pieces of a request with one choice to content, reasoning and calls, and how it ended. Knows no dialect."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ....core.request import FinishReason, Request
from ...requests.pieces import OutputDelta, TokenUsage
from ..models import ServedModel
from ..output import ChoiceOutput, ParsedDelta, joined


class OneChoice:
    """The answer of a request with `n` 1, piece by piece."""

    def __init__(self, request: Request, model: ServedModel, stops: Sequence[str] = ()) -> None:
        """`stops`: stop strings that stand in the text and are taken out of it here, to learn which one ended it."""
        self._output = ChoiceOutput(request, 0, model) if request.answer is not None else None
        self._ends = {*model.tokenizer.eos_ids, *request.sampling.stop_token_ids}
        self._stops = sorted(stops, key=len, reverse=True)  # of several that end together the longest counts
        self._held = ""  # text that may be the stop string of the end
        self._last_id: int | None = None
        self.usage: TokenUsage | None = None
        self.reason: FinishReason | None = None
        self.stop: str | None = None  # the stop string that ended the text
        self.num_tokens = 0

    @property
    def reasoning_tokens(self) -> int:
        """Tokens of the reasoning so far."""
        return 0 if self._output is None else self._output.reasoning_tokens

    def take(self, piece: OutputDelta) -> ParsedDelta:
        """Add a piece; returns what is certain now."""
        return joined(self.parts(piece))

    def parts(self, piece: OutputDelta) -> list[ParsedDelta]:
        """The same in the order of the text, each part of one kind."""
        self.num_tokens += len(piece.token_ids)
        self._last_id = piece.token_ids[-1] if piece.token_ids else self._last_id
        self.usage = piece.usage or self.usage
        piece = replace(piece, text=self._without_stop(piece))
        if self._output is None:
            self.reason = piece.finish_reason
            return [ParsedDelta(piece.text)] if piece.text else []
        parts = self._output.parts(piece)
        self.reason = self._output.reason(piece.finish_reason)
        return parts

    def _without_stop(self, piece: OutputDelta) -> str:
        """Text of a piece, without the stop string at the end of the answer. A stop string comes whole in one piece."""
        text, self._held = self._held + piece.text, ""
        found = next((stop for stop in self._stops if text.endswith(stop)), None)
        if found is None:
            return text
        if piece.finish_reason is None:
            self._held = found
            return text[: -len(found)]
        if piece.finish_reason is not FinishReason.STOP or self._last_id in self._ends:
            return text
        self.stop = found
        return text[: -len(found)]
