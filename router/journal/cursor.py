"""What a client has of a resumable stream, written as a cursor, and which pieces it still lacks. Pure.

    cursor = per choice COUNT~CHARS[e]-DIGEST, joined by dots      "12~40-9f3a66e0.7~22e-01b2c3d4", "0": it has nothing

COUNT tokens of the choice are there, and CHARS characters of its text; `e`: and its end. The digest is over the ids, so
a stream that says something else up to there is recognised before it is continued: a resumed stream is the rest of the
same one, or an error. Another router that computes the stream again may pack its tokens into other pieces: a piece that
the client has a part of is split there, by the characters.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace
from typing import NamedTuple

from ...core.errors import CursorLost, InvalidRequest
from ..requests.pieces import OutputDelta

MAX_CURSOR_CHARS = 4096
_NUMBER = r"(0|[1-9][0-9]{0,8})"
_PART = re.compile(rf"{_NUMBER}(?:~{_NUMBER})?(e?)(?:-([0-9a-f]{{8}}))?", re.ASCII)
_EMPTY = b"\0" * 8


class Mark(NamedTuple):
    """What a client has of one choice."""

    num_tokens: int = 0
    has_end: bool = False
    digest: str = ""  # of the token ids; empty without any
    num_chars: int | None = None  # of the text; None: unknown, so no piece can be split

    def __str__(self) -> str:
        digest = f"-{self.digest}" if self.digest else ""
        chars = "" if self.num_chars is None else f"~{self.num_chars}"
        return f"{self.num_tokens}{chars}{'e' if self.has_end else ''}{digest}"


def parse_cursor(text: str, num_choices: int, param: str) -> tuple[Mark, ...]:
    """The marks of a cursor; an empty text is the beginning.

    Raises:
        InvalidRequest: it is none, or of another number of choices.
    """
    if not text:
        return (Mark(),) * num_choices
    parts = text.split(".") if len(text) <= MAX_CURSOR_CHARS else []
    found = [_PART.fullmatch(part) for part in parts]
    if len(found) != num_choices or not all(found):
        raise InvalidRequest(
            f"{param} has the cursor {text[:40]!r}; give the one of the last event as it came", param=param
        )
    return tuple(
        Mark(int(one[1]), bool(one[3]), one[4] or "", None if one[2] is None else int(one[2])) for one in found if one
    )


@dataclass(slots=True)
class _Progress:
    num_tokens: int = 0
    num_chars: int = 0
    has_end: bool = False
    state: bytes = _EMPTY

    @property
    def mark(self) -> Mark:
        digest = self.state[:4].hex() if self.num_tokens else ""
        return Mark(self.num_tokens, self.has_end, digest, self.num_chars or None)


class Track:
    """Follows a stream from its beginning, for a client that has a part of it."""

    def __init__(self, num_choices: int, had: tuple[Mark, ...] = ()) -> None:
        """`had`: what the client has; empty: nothing."""
        self._choices = [_Progress() for _ in range(num_choices)]
        self._had = had or (Mark(),) * num_choices

    @property
    def cursor(self) -> str:
        """The cursor after all pieces so far."""
        return ".".join(str(choice.mark) for choice in self._choices)

    @property
    def is_confirmed(self) -> bool:
        """True if all that the client has came by as it has it. Before that nothing may be sent to it."""
        pairs = zip(self._choices, self._had, strict=True)
        return all(now.num_tokens >= had.num_tokens and now.has_end >= had.has_end for now, had in pairs)

    def parts(self, piece: OutputDelta) -> tuple[OutputDelta, ...]:
        """The next piece; in two, if the client has a part of it. Give each to `take`."""
        choice, had = self._choices[piece.choice], self._had[piece.choice]
        num, after = had.num_tokens - choice.num_tokens, choice.num_tokens + len(piece.token_ids)
        lacks_some = after > had.num_tokens or (piece.finish_reason is not None and not had.has_end)
        chars = (had.num_chars or 0) - choice.num_chars
        if num <= 0 or had.num_tokens > after or not lacks_some or not 0 <= chars <= len(piece.text):
            return (piece,)
        first = replace(
            piece,
            token_ids=piece.token_ids[:num],
            text=piece.text[:chars],
            finish_reason=None,
            usage=None,
            logprobs=piece.logprobs[:num],
            num_shown=min(piece.num_shown, had.num_tokens),
        )
        rest = replace(
            piece,
            first_index=piece.first_index + num,
            token_ids=piece.token_ids[num:],
            text=piece.text[chars:],
            logprobs=piece.logprobs[num:],
            prompt_scores=(),
        )
        return first, rest

    def take(self, piece: OutputDelta) -> bool:
        """Follow the next piece of `parts`. Returns whether the client lacks it.

        Raises:
            CursorLost: the client has something else, or a part of this piece that cannot be told from the rest.
        """
        choice, had = self._choices[piece.choice], self._had[piece.choice]
        before = choice.num_tokens
        for token_id in piece.token_ids:
            choice.state = hashlib.blake2b(choice.state + token_id.to_bytes(4, "little"), digest_size=8).digest()
        choice.num_tokens += len(piece.token_ids)
        choice.num_chars += len(piece.text)
        choice.has_end = choice.has_end or piece.finish_reason is not None
        after = choice.num_tokens
        if before < had.num_tokens == after and choice.mark.digest != had.digest:
            raise CursorLost(f"choice {piece.choice} has other tokens now than its client; start a new request")
        is_split = before < had.num_tokens < after
        is_short = choice.has_end and after < had.num_tokens
        is_mixed = choice.has_end and not had.has_end and bool(piece.token_ids) and after == had.num_tokens
        if is_split or is_short or is_mixed or (had.has_end and after > had.num_tokens):
            raise CursorLost(f"choice {piece.choice} cannot go on after token {had.num_tokens}; start a new request")
        if piece.finish_reason is not None:
            return not had.has_end
        return after > had.num_tokens or (after == had.num_tokens == before)
