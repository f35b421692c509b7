"""End of generation, decided by token ids alone. Knows no text: the face handles stop strings."""

from __future__ import annotations

from collections.abc import Collection

from ..core.request import FinishReason, SamplingParams


def finish_reason(
    token_id: int, num_generated: int, params: SamplingParams, eos_ids: Collection[int]
) -> FinishReason | None:
    """Finish reason after `token_id`, the `num_generated`-th token of the choice (from 1); None: it continues.

    Tokens of earlier dispatches count. If both STOP and LENGTH hold, the reason is STOP; before `min_tokens` only
    LENGTH ends a choice.
    """
    if num_generated >= params.min_tokens:
        is_eos = token_id in eos_ids and not params.ignore_eos
        if is_eos or token_id in params.stop_token_ids:
            return FinishReason.STOP
    if num_generated >= params.max_tokens:
        return FinishReason.LENGTH
    return None
