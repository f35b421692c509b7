"""Decisions of a router's log, made again by the production policy and compared with the record. Reads a file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.errors import ConfigError, InvalidRequest
from ...router.requests.explain import explain_choice
from ...router.routing.policy import choose
from ...router.routing.recorded import asked_from_json


@dataclass(frozen=True, slots=True)
class Replayed:
    """The result for a whole log."""

    num_requests: int
    num_decisions: int  # made again
    num_without: int  # requests whose line has no decisions: of another release, never routed, or too long
    difference: str | None  # the first one, with file, line, request, attempt and field; None: all are the same


def replay_decisions(path: Path) -> Replayed:
    """Make every decision of a log again; ends at the first that differs. A last line that was cut is left out.

    Raises:
        ConfigError: the file cannot be read; a malformed line is named with its number.
    """
    num_requests = num_decisions = num_without = 0
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip() or (not line.endswith("\n") and _is_cut(line)):
                    continue
                where = f"{path}:{number}"
                entry = _entry(where, line)
                num_requests += 1
                decisions = entry.get("decisions")
                if not isinstance(decisions, list) or not decisions:
                    num_without += 1
                    continue
                for attempt, told in enumerate(decisions, 1):
                    num_decisions += 1
                    name = f"{where}: request {entry['request_id']!r}, attempt {attempt}"
                    if (difference := _difference(name, told)) is not None:
                        return Replayed(num_requests, num_decisions, num_without, f"{name}: {difference}")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {getattr(error, 'strerror', None) or 'it is not UTF-8 text'}") from None
    return Replayed(num_requests, num_decisions, num_without, None)


def _is_cut(line: str) -> bool:
    """True if the last line of a log is not whole: it was being written when its router ended."""
    try:
        json.loads(line)
    except ValueError:
        return True
    return False


def _entry(where: str, line: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where}: not JSON: {error}") from None
    if not isinstance(entry, dict) or "request_id" not in entry:
        raise ConfigError(f"{where}: no entry of a decision log: request_id is missing")
    return entry


def _difference(name: str, told: Any) -> str | None:
    """The first field of a decision that comes out otherwise."""
    try:
        asked, recorded = asked_from_json(told["asked"]), told["choice"]
    except (InvalidRequest, KeyError, TypeError) as error:
        raise ConfigError(f"{name}: {error}") from None
    choice = choose(asked.request, asked.workers, asked.held, asked.limits, asked.sources)
    now = None if choice is None else json.loads(json.dumps(explain_choice(choice)))
    return next(_differing("choice", recorded, now), None)


def _differing(field: str, recorded: Any, now: Any) -> Iterator[str]:
    if isinstance(recorded, dict) and isinstance(now, dict):
        for name in [*recorded, *(name for name in now if name not in recorded)]:
            yield from _differing(f"{field}.{name}", recorded.get(name), now.get(name))
    elif isinstance(recorded, list) and isinstance(now, list) and len(recorded) == len(now):
        for place, pair in enumerate(zip(recorded, now, strict=True)):
            yield from _differing(f"{field}[{place}]", *pair)
    elif recorded != now or type(recorded) is not type(now):
        yield f"{field} was {_shown(recorded)}, is {_shown(now)} now"


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:120] + "..."
