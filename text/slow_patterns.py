"""Patterns of a tokenizer.json that take quadratic time on long runs of blanks. Knows no vocabulary.

`\\s+$` is tried at every blank of a run that something follows, and reads to the run's end each time: 40 kB take ten
seconds. On its own it is replaced by one that finds the same and is tried once per run; within a larger pattern it
cannot be, so the runs are bounded there.
"""

from __future__ import annotations

import re

from ..core.errors import InvalidRequest

MAX_BLANKS = 4_096  # in a row; some ten milliseconds

_TRAILING = r"\\s+$"  # as JSON spells it
_ALONE = re.compile(r'("Regex"\s*:\s*)"' + re.escape(_TRAILING) + '"')
_WITHIN = re.compile(r'"Regex"\s*:\s*"(?:[^"\\]|\\.)*' + r"(?<!\(\?<!\\\\s\))" + re.escape(_TRAILING))
_RUN = re.compile(r"\s+")


def without_slow_patterns(source: str) -> tuple[str, bool]:
    """The tokenizer.json with what can be replaced, and whether runs of blanks must be bounded all the same."""
    replaced = _ALONE.sub(lambda found: f'{found[1]}"(?<!\\\\s){_TRAILING}"', source)
    return replaced, _WITHIN.search(replaced) is not None


def check_blanks(text: str) -> None:
    """Refuse a text with a long run of blanks. Raises InvalidRequest."""
    for run in _RUN.finditer(text):
        length = run.end() - run.start()
        if length > MAX_BLANKS:
            raise InvalidRequest(
                f"the text has {length} blanks in a row at character {run.start()}; this model's tokenizer takes at "
                f"most {MAX_BLANKS}: shorten them"
            )
