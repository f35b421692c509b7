"""Patterns of a tokenizer.json that take quadratic time on long runs of blanks. Knows no vocabulary.

If text follows a run of blanks, `\\s+$` is tried at every blank of the run and reads to its end each time: 40 kB take
ten seconds. As a whole pattern it is replaced by one with the same matches that is tried once per run. As part of a
larger pattern it cannot be replaced, so the length of runs is bounded.
"""

from __future__ import annotations

import re

from ..core.errors import InvalidRequest

MAX_BLANKS = 4_096  # longest run; takes about ten milliseconds

_TRAILING = r"\\s+$"  # as written in JSON
_ALONE = re.compile(r'("Regex"\s*:\s*)"' + re.escape(_TRAILING) + '"')
_WITHIN = re.compile(r'"Regex"\s*:\s*"(?:[^"\\]|\\.)*' + r"(?<!\(\?<!\\\\s\))" + re.escape(_TRAILING))
_RUN = re.compile(r"\s+")


def without_slow_patterns(source: str) -> tuple[str, bool]:
    """Replace slow patterns of a tokenizer.json. Also returns whether slow ones are left, so that runs need a bound."""
    replaced = _ALONE.sub(lambda found: f'{found[1]}"(?<!\\\\s){_TRAILING}"', source)
    return replaced, _WITHIN.search(replaced) is not None


def check_blanks(text: str) -> None:
    """Raise InvalidRequest for a text with a too long run of blanks."""
    for run in _RUN.finditer(text):
        length = run.end() - run.start()
        if length > MAX_BLANKS:
            raise InvalidRequest(
                f"the text has {length} blanks in a row at character {run.start()}; this model's tokenizer takes at "
                f"most {MAX_BLANKS}: shorten them"
            )
