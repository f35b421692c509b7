"""Pieces of one choice as one piece: for whoever needs the answer, not the steps in which it came. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..requests.pieces import OutputDelta


def merged(pieces: Sequence[OutputDelta]) -> list[OutputDelta]:
    """The pieces of a request with one choice, joined; those with logprobs stay as they are.

    A reader of the text finds the same in it, however it was cut.
    """
    if len(pieces) < 2 or any(piece.logprobs or piece.choice for piece in pieces):
        return list(pieces)
    first, last = pieces[0], pieces[-1]
    return [
        replace(
            first,
            token_ids=tuple(token_id for piece in pieces for token_id in piece.token_ids),
            text="".join(piece.text for piece in pieces),
            finish_reason=last.finish_reason,
            usage=last.usage,
            num_shown=last.num_shown,
        )
    ]
