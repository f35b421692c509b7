"""Cause of a member's end in one line, extracted from the last output of its process. Knows no process and no Ray."""

from __future__ import annotations

import re
import signal
from enum import Enum
from typing import NamedTuple

from ...core.errors import DeviceCordoned, DeviceFault, TwostrokeError


class DeviceEnd(Enum):
    """What the end of a worker says about its GPU."""

    NONE = "none"
    FAULT = "fault"  # it lost or spoiled the worker's work
    CORDONED = "cordoned"  # it must not be used again


_LONGEST = 400  # characters of a cause
_TYPED = "twostroke: "  # prefix of the line with which our commands report a typed error
_WANTED_ENDS = (signal.SIGINT, signal.SIGTERM)  # `leave` of core/foreground.py adds 128
_TYPED_EXIT = 2  # exit code after a typed error
_DEVICE_EXITS = {DeviceFault.exit_code: DeviceEnd.FAULT, DeviceCordoned.exit_code: DeviceEnd.CORDONED}
_DEVICE_ERRORS = {"DeviceFault": DeviceEnd.FAULT, "DeviceCordoned": DeviceEnd.CORDONED}
_RAISED = re.compile(r"^((?:\w+\.)*)([A-Z]\w+)(?:: (.*))?$")  # last line of a traceback


class ProcessEnd(NamedTuple):
    """The end of one member's process."""

    cause: str  # one line
    is_certain: bool = False  # a typed error of ours: another start would end the same way
    device: DeviceEnd = DeviceEnd.NONE


def end_of_process(code: int, output: str) -> ProcessEnd:
    """The end of a process, from its exit code and its last output."""
    if code == 0:
        return ProcessEnd("exit code 0: it was told to stop")
    if code < 0:
        return ProcessEnd(f"exit code {code}: {_signal_words(-code)}")
    if code - 128 in _WANTED_ENDS:  # what it said long before is no cause
        return ProcessEnd(f"exit code {code}: it was told to stop by {_signal_words(code - 128)}, more than once")
    typed = [line for line in output.splitlines() if line.startswith(_TYPED)]
    if typed and code in _DEVICE_EXITS:
        return ProcessEnd(_short(typed[-1].removeprefix(_TYPED)), device=_DEVICE_EXITS[code])
    if typed and code == _TYPED_EXIT:
        return ProcessEnd(_short(typed[-1].removeprefix(_TYPED)), is_certain=True)
    return ProcessEnd(": ".join(part for part in (f"exit code {code}", cause_of(output)) if part))


def end_of_adopted(output: str) -> ProcessEnd:
    """The end of a process that is not our child, from its last output: nobody but its parent gets the exit code.

    What it says of its GPU is not known then; the next process looks at the GPU itself before it serves.
    """
    cause = cause_of(output)
    return ProcessEnd(f"its supervisor was another one, so its exit code is not known{cause and f'; last: {cause}'}")


def end_of_error(text: str) -> ProcessEnd:
    """The end of a process, from the text of an error that carries its traceback."""
    lines = _lines(text)
    for place in range(len(lines) - 1, -1, -1):
        found = _RAISED.match(lines[place])
        if found and found[1].startswith("twostroke.core.errors."):
            device = _DEVICE_ERRORS.get(found[2], DeviceEnd.NONE)
            cause = _short(" ".join([found[3] or found[2], *lines[place + 1 :]]))
            return ProcessEnd(cause, is_certain=device is DeviceEnd.NONE, device=device)
    return ProcessEnd(cause_of(text) or "it ended without a word")


def end_of_typed(error: TwostrokeError) -> ProcessEnd:
    """The end of a member by a typed error in this process."""
    if isinstance(error, DeviceFault):
        return ProcessEnd(_short(str(error)), device=_DEVICE_ERRORS[type(error).__name__])
    return ProcessEnd(str(error), is_certain=True)


def cause_of(output: str) -> str:
    """The last error that `output` names, else its last line; empty if there is nothing."""
    lines = _lines(output)
    raised = [found for line in lines if (found := _RAISED.match(line)) and (found[1] or found[2].endswith("Error"))]
    if "Traceback" in output and raised:
        return _short(": ".join(part for part in (raised[-1][2], raised[-1][3]) if part))
    return _short(lines[-1]) if lines else ""


def _lines(text: str) -> list[str]:
    """Non-empty lines before Python's "Exception ignored in" messages, which come after the cause."""
    told = text.partition("Exception ignored in")[0]
    return [line.strip() for line in told.splitlines() if line.strip()]


def _signal_words(number: int) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    if name == "SIGKILL":
        return "SIGKILL: `kill -9`, or a system out of memory"
    return name


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
