"""The edges of both hand-over machines as tables, from what the search saw them do; docs/handover.md contains them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from ...kv.handover.receiver import ReceiverState
from ...kv.handover.sender import SenderState
from .automaton import Edge
from .search import search
from .state import Scope

SCOPE = Scope(faults=1, is_crowded=True)


def edges() -> tuple[frozenset[Edge], frozenset[Edge]]:
    """Edges of the receiver and of the sender."""
    found = search(SCOPE)
    assert found.is_closed, found.violation
    return found.receiver_edges, found.sender_edges


def table(found: Iterable[Edge], states: Iterable[str]) -> str:
    """Markdown table of edges, in the order of `states`."""
    order = {state: place for place, state in enumerate(("", *states))}
    events: dict[tuple[str, str], list[str]] = defaultdict(list)
    for edge in sorted(found):
        events[edge.before, edge.after].append(edge.event)
    lines = ["| state | event | next state |", "|---|---|---|"]
    for before, after in sorted(events, key=lambda pair: (order[pair[0]], order[pair[1]])):
        goes = "stays" if before == after else after or "refused"
        lines.append(f"| {before or '(none)'} | {'; '.join(events[before, after])} | {goes} |")
    return "\n".join(lines)


def tables() -> tuple[str, str]:
    """The tables of the receiver and of the sender."""
    receiver, sender = edges()
    return table(receiver, map(str, ReceiverState)), table(sender, map(str, SenderState))
