"""Tokens and text of one choice as the client will see them: gapless, ended once. Knows no engine and no stream."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from ..core.errors import InternalError
from ..core.request import FinishReason, SamplingParams, TokenLogprobs
from ..engine.stopping import finish_reason
from ..text.stream import TextStream
from ..text.tokenizer import Tokenizer


class TextDelta(NamedTuple):
    """What new tokens bring the client."""

    first_index: int  # place of token_ids[0] among the choice's generated tokens
    token_ids: tuple[int, ...]  # may be empty: all were known already
    text: str
    ended: FinishReason | None  # why the choice ends with the last of them
    is_by_text: bool = False  # a stop string ended it, which the ids alone do not show
    logprobs: tuple[TokenLogprobs, ...] = ()  # of the token ids, if asked for


class ChoiceText:
    """The one place that decides which tokens count.

    A token that ends the choice counts but adds no text (unless the request includes what stopped it); what follows it,
    or a stop string, does not count.
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
        """`emitted_ids`: what an earlier dispatch gave the client already; text state is rebuilt from them.

        `prompt_ids`: without these; the text goes on from the prompt's.

        Raises:
            InvalidRequest: a stop string is empty.
        """
        self._params = params
        self._eos_ids = eos_ids
        self._text = TextStream(
            tokenizer,
            params.stop,
            params.skip_special_tokens,
            min_tokens=params.min_tokens,
            include_stop=params.include_stop,
            prompt_ids=prompt_ids,
        )
        self._text.push(emitted_ids)
        self.num_tokens = len(emitted_ids)
        self.ended: FinishReason | None = FinishReason.STOP if self._text.is_stopped else None

    @property
    def num_shown(self) -> int:
        """Leading tokens whose text is out; what a stop string cut off is not among them."""
        return self._text.num_shown

    def push(self, first_index: int, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs] = ()) -> TextDelta:
        """Take tokens from `first_index` on. What is known already (said again after a fall-back) does not count.

        Nor does anything after the end. `logprobs`: one per token, or none.

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
        """The choice is over: text that was withheld in case a stop string or a character went on.

        It may complete a stop string: `ended` is STOP then.
        """
        tail = self._text.flush()
        if self._text.is_stopped and self.ended is FinishReason.LENGTH:
            self.ended = FinishReason.STOP
        return tail
