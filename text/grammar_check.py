"""Process that checks grammars: a compiler that a hostile grammar may hold, or crash, without harm to its parent.

Reads one JSON object per line, {"kind", "source"}, and answers each with a line, {"error": null or text}. The kernel
ends the process when one check takes too long or too much memory; the parent sees the end of the answers.
"""

from __future__ import annotations

import json
import resource
import signal
import sys

from ..core.errors import InvalidRequest
from ..core.request import Grammar
from .grammar import GrammarCompiler
from .tokenizer import Tokenizer

CHECK_S = 5  # of one grammar
MAX_DATA_BYTES = 2 << 30  # of the process


def main(directory: str, vocab_size: int, eos_ids: list[int]) -> None:
    """Answer until the input ends."""
    resource.setrlimit(resource.RLIMIT_DATA, (MAX_DATA_BYTES, MAX_DATA_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    compiler = GrammarCompiler(Tokenizer.load(directory), vocab_size, eos_ids)
    compiler.check(Grammar("regex", "a"))  # makes the index of the vocabulary
    _answer(None)
    for line in sys.stdin:
        asked = json.loads(line)
        signal.alarm(CHECK_S)
        error = None
        try:
            compiler.check(Grammar(asked["kind"], asked["source"]))
        except InvalidRequest as refusal:
            error = refusal.message
        signal.alarm(0)
        _answer(error)


def _answer(error: str | None) -> None:
    sys.stdout.write(json.dumps({"error": error}) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), [int(id_) for id_ in sys.argv[3].split(",")])
