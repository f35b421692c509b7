"""Logprobs in the formats of OpenAI's two APIs and of vLLM's extension. Knows no answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...core.request import TokenLogprobs
from ...text.token_text import TokenTexts


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
