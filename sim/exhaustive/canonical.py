"""Canonical value of an object's state: equal values mean equal behaviour. Knows no machine.

Every attribute counts unless it is listed as one that no later decision reads (`IGNORED`), so a new attribute of a
production class either becomes part of the state or is refused as a type that has no canonical value.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict, deque
from collections.abc import Hashable
from enum import Enum
from typing import Any

IGNORED: dict[str, frozenset[str]] = {
    "DecodeTask": frozenset(
        [
            "order",
            "timeline",
            "_outbox",
            "_tools",
            "_ended",
            "_received_at_s",
            "_deadline_s",
            "_last_token_s",
            "_gaps_s",
            "told",
        ]
    ),
    "KvPull": frozenset(
        [
            "transport_reason",
            "bytes_per_s",
            "timeline",
            "prefill_cached_tokens",
            "prefill_fetched",
            "refetched_blocks",
            "_host",
            "_engine_key",
            "_owner",
            "_tools",
            "_arrivals",
            "_opened_at_s",
            "_carrier",
            "_envelopes",
        ]
    ),
    "PrefillTask": frozenset(
        ["_submit", "_host", "_tools", "_timeline", "_seen_at_s", "_carrier", "_read_planes", "_mismatches", "memory"]
    ),
    "Receiver": frozenset(["label", "_order"]),
    "Sender": frozenset(["label", "order", "_transport_reason", "_fetched"]),
    "NumberedStream": frozenset(["label", "timing", "deadline_s", "said_s", "heard_s"]),
    "Counters": frozenset(
        [
            "messages_sent",
            "messages_received",
            "frame_bytes",
            "duplicates",
            "stale",
            "gaps",
            "refetches",
            "late",
            "shared_frames",
            "shared_bytes",
        ]
    ),
    "Peer": frozenset(),
    "SourceLine": frozenset(["_findable"]),  # no cache is modelled, so no order names a source
    "SilentChoice": frozenset(["_params", "_eos_ids", "_text"]),
}
VALUES = (int, float, str, bytes, bool, type(None), Enum)


def canonical(value: Any) -> Hashable:
    """The canonical value of plain values, containers, and objects of the classes in `IGNORED`.

    Raises:
        TypeError: the value is of another type; its class belongs to `IGNORED`, or its attribute to the ignored ones.
    """
    if isinstance(value, VALUES):
        return value
    if isinstance(value, bytearray):
        return bytes(value)
    if isinstance(value, list | tuple | deque | array):
        return tuple(canonical(item) for item in value)
    if isinstance(value, set | frozenset):
        return tuple(sorted(canonical(item) for item in value))  # type: ignore[type-var]
    if isinstance(value, OrderedDict):
        return tuple((canonical(key), canonical(item)) for key, item in value.items())
    if isinstance(value, dict):
        return tuple(sorted(((canonical(key), canonical(item)) for key, item in value.items()), key=repr))
    name = type(value).__name__
    if name not in IGNORED:
        raise TypeError(f"{type(value)} has no canonical value")
    return (name, *(canonical(_of(value, one)) for one in _attributes(value) if one not in IGNORED[name]))


def _attributes(value: Any) -> list[str]:
    slots = [one for owner in type(value).__mro__ for one in getattr(owner, "__slots__", ())]
    return sorted({*slots, *getattr(value, "__dict__", {})})


def _of(value: Any, attribute: str) -> Any:
    return getattr(value, attribute, None)
