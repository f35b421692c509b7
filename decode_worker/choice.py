"""Tokens and text of one choice for the client: without gaps, ended once. Knows no engine and no stream."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from ..core.errors import InternalError
from ..core.request import FinishReason, SamplingParams, TokenLogprobs
from ..engine.stopping import finish_reason
from ..text.stream import TextStream
from ..text.tokenizer import Tokenizer


class TextDelta(NamedTuple):
    """New output of a choice for the client."""

    first_index: int  # index of token_ids[0] among the choice's generated tokens
    token_ids: tuple[int, ...]  # empty if all were known already
    text: str
    ended: FinishReason | None  # set if the choice ends with the last of these tokens
    is_by_text: bool = False  # a stop string ended the choice; the token ids alone do not show it
    logprobs: tuple[TokenLogprobs, ...] = ()  # of the token ids, if asked for


class ChoiceText:
    """Text of one choice; decides which of the engine's tokens belong to the output.

    A token that ends the choice belongs to it but adds no text (unless the request asks to include the stop). Tokens
    after it, or after a stop string, do not belong to the output.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        params: SamplingParams,
        eos_ids: Collection[int],
        emitted_ids: Sequence[int] = (),
        *,
        prompt_ids: Sequence[int] = (),
    ) -> None:
        """`emitted_ids`: tokens that an earlier dispatch sent to the client; text state is rebuilt from them.

        `prompt_ids`: the prompt, without `emitted_ids`; the text continues the prompt's text.

        Raises:
            InvalidRequest: a stop string is empty.
            InternalError: the choice had ended before the last of `emitted_ids`.
        """
        text = TextStream(
            tokenizer,
            params.stop,
            params.skip_special_tokens,
            min_tokens=params.min_tokens,
            include_stop=params.include_stop,
            prompt_ids=prompt_ids,
        )
        self._begin(text, params, eos_ids, emitted_ids)

    def _begin(
        self, text: TextStream, params: SamplingParams, eos_ids: Collection[int], emitted_ids: Sequence[int]
    ) -> None:
        self._text = text
        self._params = params
        self._eos_ids = eos_ids
        self.num_tokens = 0
        self.ended: FinishReason | None = None  # also by the emitted tokens alone, if their worker died with the end
        self.push(0, emitted_ids)  # the client has the text that this returns
        if self.num_tokens < len(emitted_ids):
            raise InternalError(f"{len(emitted_ids)} tokens were emitted; the choice ended after {self.num_tokens}")

    @property
    def num_shown(self) -> int:
        """Number of leading tokens whose text was returned, without tokens that a stop string cut off."""
        return self._text.num_shown

    def push(self, first_index: int, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs] = ()) -> TextDelta:
        """Take tokens from `first_index` on and return the new output.

        Tokens that are known already (repeated after a fall-back) and tokens after the end are ignored.
        `logprobs`: one per token, or none.

        Raises:
            InternalError: tokens between the known ones and `first_index` are missing.
        """
        if self.ended is not None:
            return TextDelta(self.num_tokens, (), "", None)
        if first_index > self.num_tokens:
            raise InternalError(f"token {first_index} came where {self.num_tokens} was next")
        start = self.num_tokens
        texts: list[str] = []
        counted: list[int] = []
        is_by_text = False
        for token_id in token_ids[start - first_index :]:
            if self.ended is not None:
                break
            counted.append(token_id)
            self.num_tokens += 1
            self.ended = finish_reason(token_id, self.num_tokens, self._params, self._eos_ids)
            has_text = self.ended is not FinishReason.STOP or self._params.include_stop
            if has_text or self._text.may_stop_at(token_id):
                piece = self._text.push((token_id,))
                texts.append(piece.text)
                if piece.is_stopped:
                    self.ended, is_by_text = FinishReason.STOP, True
        told = tuple(logprobs[start - first_index :][: len(counted)])
        return TextDelta(start, tuple(counted), "".join(texts), self.ended if counted else None, is_by_text, told)

    def flush(self) -> str:
        """End the text; returns the part that was withheld for an unfinished character or a possible stop string.

        If that part completes a stop string, `ended` changes to STOP.
        """
        tail = self._text.flush()
        if self._text.is_stopped and self.ended is FinishReason.LENGTH:
            self.ended = FinishReason.STOP
        return tail
