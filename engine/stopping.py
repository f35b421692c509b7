"""When a choice has said enough, judged by token ids alone. Knows no text: stop strings are the face's."""

from __future__ import annotations

from collections.abc import Collection

from ..core.request import FinishReason, SamplingParams


def finish_reason(
    token_id: int, num_generated: int, params: SamplingParams, eos_ids: Collection[int]
) -> FinishReason | None:
    """Why generation ends with `token_id`, the `num_generated`-th token of the choice (from 1), or None: it goes on.

    Tokens of earlier dispatches count. STOP wins over LENGTH when both hold; nothing but LENGTH ends a choice before
    `min_tokens`.
    """
    if num_generated >= params.min_tokens:
        is_eos = token_id in eos_ids and not params.ignore_eos
        if is_eos or token_id in params.stop_token_ids:
            return FinishReason.STOP
    if num_generated >= params.max_tokens:
        return FinishReason.LENGTH
    return None
