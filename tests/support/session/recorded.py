"""Recorded files: transcripts and digests that tests compare with the code; `pytest --rewrite` records them again.

A transcript has one event per line. The answers to an event stand below it, indented. A line that begins with `= `
(indented or not) shows a state. Empty lines, lines that begin with `# ` and what stands behind `  # ` are comments.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import pytest

COMMENT = re.compile(r"\s{2,}#\s.*$")
INDENT = " " * 4
REWRITTEN = "rewritten file"  # the property of a test's report


class Stage(Protocol):
    """The code under test, driven by a transcript."""

    def play(self, line: str) -> list[str]: ...

    def state(self) -> str: ...


class Recorded:
    """Compares texts with files, for one test."""

    def __init__(self, nodeid: str, is_rewriting: bool, report: Callable[[str, object], None]) -> None:
        self._nodeid = nodeid
        self._is_rewriting = is_rewriting
        self._report = report

    def check(self, path: Path, actual: str) -> None:
        """Fail with a diff where the file holds another text; with `--rewrite` write the text into the file instead."""
        recorded = path.read_text()
        if actual == recorded:
            return
        if self._is_rewriting:
            path.write_text(actual)
            self._report(REWRITTEN, str(path))
            return
        lines = difflib.unified_diff(
            recorded.splitlines(), actual.splitlines(), f"{path.name} (recorded)", "the code now", lineterm="", n=6
        )
        pytest.fail("\n".join((f"{path} differs:", *lines, "", self.advice)), pytrace=False)

    def check_transcript(self, path: Path, stage: Stage) -> None:
        """Play a transcript's events on a fresh stage, and `check` the answers. Comments stay where they are."""
        self.check(path, transcript(path.read_text(), stage))

    @property
    def advice(self) -> str:
        """The command that records what the code says now."""
        return f"If the code is right, record it: python -m pytest --rewrite '{self._nodeid}'"


def transcript(text: str, stage: Stage) -> str:
    """The events and comments of a transcript, with the answers that the stage gives."""
    told: list[str] = []
    for block in _blocks(text.splitlines()):
        event, recorded = _words(block[0]), block[1:]
        if not event or event.startswith("#"):
            told += block
        elif event.startswith("= "):
            told.append(_same_or(block[0], f"= {stage.state()}"))
        else:
            answers = [f"{INDENT}{answer}" for answer in stage.play(event)]
            answers += [f"{INDENT}= {stage.state()}" for line in recorded if line.startswith(f"{INDENT}= ")]
            told += [block[0], *_with_comments(recorded, answers)]
    return "\n".join(told) + "\n"


def _blocks(lines: list[str]) -> Iterator[list[str]]:
    """Each line that is not indented, with the indented ones that follow it."""
    block: list[str] = []
    for line in lines:
        if block and line.startswith(" "):
            block.append(line)
            continue
        if block:
            yield block
        block = [line]
    if block:
        yield block


def _with_comments(recorded: list[str], answers: list[str]) -> list[str]:
    """The answers; an answer that was recorded keeps the comment behind it."""
    left, found = list(recorded), []
    for answer in answers:
        same = next((line for line in left if _words(line) == answer), None)
        if same is not None:
            left.remove(same)
        found.append(same or answer)
    return found


def _same_or(line: str, words: str) -> str:
    return line if _words(line) == words else words


def _words(line: str) -> str:
    return COMMENT.sub("", line).rstrip()
