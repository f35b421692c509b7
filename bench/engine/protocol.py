"""How a contestant talks to the campaign: JSON lines over stdin and stdout. Knows no engine; standard library only.

    {"do": "prepare"}                                        -> facts about what was loaded
    {"do": "prefill", "batch": 8, "seed": 1, "repeats": 1}   -> traces of one new token per prompt
    {"do": "decode", "batch": 16, "seed": 2, "repeats": 1}   -> traces of the reference work's new tokens
    {"do": "memory"}                                         -> this process's memory in bytes
    {"do": "quit"}

Every contestant draws the same prompts from the same seed. An answer is {"ok": true, ...} or {"ok": false, "error": …}.
Between commands a contestant blocks on stdin and computes nothing.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

PROMPT_TOKENS = 512
NEW_TOKENS = 32
VOCABULARY = 32_000
FIRST_PLAIN_ID = 300  # before it: special tokens and single bytes
MAX_BATCH = 16
RAMP_TOKENS = 16  # where prompts come in one after the other, the first ones decode so many steps before the last
_PR_SET_PDEATHSIG = 1


class Trace:
    """When which sequence got a token, in seconds since the submission."""

    def __init__(self, num_sequences: int) -> None:
        self.events: list[tuple[float, list[int]]] = []
        self.first_ids: list[int | None] = [None] * num_sequences
        self._began_s = time.perf_counter()

    def note(self, ids_by_sequence: dict[int, Sequence[int]]) -> None:
        """One step's new ids, as soon as its caller has them."""
        at_s = time.perf_counter() - self._began_s
        places: list[int] = []
        for place, ids in ids_by_sequence.items():
            places += [place] * len(ids)
            if self.first_ids[place] is None and ids:
                self.first_ids[place] = int(ids[0])
        if places:
            self.events.append((at_s, places))

    def values(self) -> dict[str, Any]:
        """For the wire."""
        return {"events": self.events, "first_ids": self.first_ids}


class Contestant(Protocol):
    """One engine with one set of options."""

    ramp_tokens: int  # more than the work's, so that all sequences decode together for the whole of it

    def prepare(self) -> dict[str, Any]:
        """Load, and say what was loaded."""
        ...

    def generate(self, prompts: list[list[int]], new_tokens: int) -> Trace:
        """Generate greedily, ignoring the end token, until every prompt has `new_tokens` tokens."""
        ...


def arguments() -> argparse.Namespace:
    """What every contestant is started with."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder that checkpoint.py made")
    parser.add_argument("--variant", default="", help="which options of this engine")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def prompts(batch: int, seed: int) -> list[list[int]]:
    """The same prompts for everybody; no two seeds share a prefix worth caching."""
    chance = random.Random(seed)
    return [[chance.randrange(FIRST_PLAIN_ID, VOCABULARY) for _ in range(PROMPT_TOKENS)] for _ in range(batch)]


def memory() -> dict[str, int]:
    """Unshared, proportional and whole resident memory."""
    import psutil

    info = psutil.Process().memory_full_info()
    return {"uss_bytes": info.uss, "pss_bytes": info.pss, "rss_bytes": info.rss}


def serve(contestant: Contestant) -> None:
    """Answer commands until `quit` or the end of stdin."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # dies with the campaign, even while it is stopped
    answers = _private_stdout()
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "quit":
            return
        try:
            answer = {"ok": True} | _answer(contestant, command)
        except Exception as error:
            traceback.print_exc()
            answer = {"ok": False, "error": f"{type(error).__name__}: {error}"[:600]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _answer(contestant: Contestant, command: dict[str, Any]) -> dict[str, Any]:
    do = command["do"]
    if do == "prepare":
        began_s = time.perf_counter()
        facts = contestant.prepare()
        return {"facts": facts, "prepare_s": round(time.perf_counter() - began_s, 2)}
    if do == "memory":
        return memory()
    if do not in ("prefill", "decode"):
        raise ValueError(f"unknown command {do!r}")
    new_tokens = 1 if do == "prefill" else NEW_TOKENS + contestant.ramp_tokens
    traces = []
    for repeat in range(command["repeats"]):
        batch = prompts(command["batch"], command["seed"] * 1000 + repeat)
        began_cpu_s = time.process_time()
        traces.append(contestant.generate(batch, new_tokens).values())
        traces[-1]["cpu_s"] = round(time.process_time() - began_cpu_s, 4)
    extra = getattr(contestant, "extra", None)
    return {"traces": traces} | ({} if extra is None else {"extra": extra()})


def _private_stdout() -> TextIO:
    """The pipe for answers; whatever else prints, native code included, goes to stderr."""
    private = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return private
