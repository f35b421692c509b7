"""How a member ended, in one line: the cause, out of what its process wrote last. Knows no process and no Ray."""

from __future__ import annotations

import re
import signal
from typing import NamedTuple

_LONGEST = 400  # characters of a cause
_TYPED = "twostroke: "  # how a command of ours begins its last line
_TYPED_EXIT = 2  # and its exit code
_RAISED = re.compile(r"^((?:\w+\.)*)([A-Z]\w+)(?:: (.*))?$")  # how a traceback ends


class ProcessEnd(NamedTuple):
    """The end of one member's process."""

    cause: str  # one line
    is_certain: bool = False  # a typed error of ours: the next start would end the same way


def end_of_process(code: int, output: str) -> ProcessEnd:
    """From an exit code and the last output of a process of ours."""
    if code == 0:
        return ProcessEnd("exit code 0: it was told to stop")
    if code < 0:
        return ProcessEnd(f"exit code {code}: {_signal_words(-code)}")
    typed = [line for line in output.splitlines() if line.startswith(_TYPED)]
    if typed and code == _TYPED_EXIT:
        return ProcessEnd(_short(typed[-1].removeprefix(_TYPED)), is_certain=True)
    return ProcessEnd(": ".join(part for part in (f"exit code {code}", cause_of(output)) if part))


def end_of_error(text: str) -> ProcessEnd:
    """From the text of an error that carries another process's traceback."""
    lines = _lines(text)
    for place in range(len(lines) - 1, -1, -1):
        found = _RAISED.match(lines[place])
        if found and found[1].startswith("twostroke.core.errors."):
            return ProcessEnd(_short(" ".join([found[3] or found[2], *lines[place + 1 :]])), is_certain=True)
    return ProcessEnd(cause_of(text) or "it ended without a word")


def cause_of(output: str) -> str:
    """The last error that `output` names, else its last line; empty if there is nothing."""
    lines = _lines(output)
    raised = [found for line in lines if (found := _RAISED.match(line)) and (found[1] or found[2].endswith("Error"))]
    if "Traceback" in output and raised:
        return _short(": ".join(part for part in (raised[-1][2], raised[-1][3]) if part))
    return _short(lines[-1]) if lines else ""


def _lines(text: str) -> list[str]:
    """Without what Python says of objects that it could not take down: that comes after the cause."""
    told = text.partition("Exception ignored in")[0]
    return [line.strip() for line in told.splitlines() if line.strip()]


def _signal_words(number: int) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    if name == "SIGKILL":
        return "SIGKILL, which the system sends when memory runs out"
    return name


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
