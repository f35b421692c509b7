"""The production machines of a cluster as automata: a state is a number, an event gives the next state and actions.

The decision of a state and event is made once, by production code: it is played again from the machine's beginning
along a shortest path, and remembered. So the search multiplies numbers, and no production object is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, Protocol

Event = tuple[Any, ...]
Step = tuple[int, tuple[Any, ...]]


class Machine(Protocol):
    """One production machine with its surroundings."""

    actions: list[Any]

    def feed(self, event: Event) -> None:
        """Handle an event; appends to `actions`."""
        ...

    def state(self) -> Hashable:
        """Canonical state."""
        ...

    def facts(self) -> Any:
        """Facts of the state that decide which events can happen."""
        ...

    def place(self) -> str:
        """State of the hand-over machine inside, by name; empty: there is none."""
        ...

    def label(self, event: Event) -> str:
        """Name of an event for the hand-over machine inside; empty: it is no event of it."""
        ...


class Edge(NamedTuple):
    """One step of a hand-over machine."""

    before: str
    event: str
    after: str


class Automaton:
    """All states of one kind of machine that were reached, numbered from 0 (the beginning)."""

    def __init__(self, build: Callable[[], Machine]) -> None:
        self.facts: list[Any] = []
        self._build = build
        self._number_by_state: dict[Hashable, int] = {}
        self._origins: list[tuple[int, Event] | None] = []
        self._steps: dict[tuple[int, Event], Step] = {}
        self.edges: set[Edge] = set()  # of the hand-over machine inside, as far as it was stepped
        self._number(build(), None)

    def __len__(self) -> int:
        return len(self.facts)

    @property
    def num_steps(self) -> int:
        """Number of different (state, event) pairs that production code decided."""
        return len(self._steps)

    def step(self, state: int, event: Event) -> Step:
        """The next state, and the actions.

        Raises:
            Violation: the event breaks an invariant.
        """
        known = self._steps.get((state, event))
        if known is None:
            machine = self._build()
            for earlier in self._path(state):
                machine.feed(earlier)
            machine.actions = []
            before, label = machine.place(), machine.label(event)
            machine.feed(event)
            after = machine.place()
            if label and (before or after):
                self.edges.add(Edge(before, label, after))
            known = self._number(machine, (state, event)), tuple(machine.actions)
            self._steps[state, event] = known
        return known

    def _path(self, state: int) -> list[Event]:
        path = []
        origin = self._origins[state]
        while origin is not None:
            path.append(origin[1])
            origin = self._origins[origin[0]]
        return path[::-1]

    def _number(self, machine: Machine, origin: tuple[int, Event] | None) -> int:
        state = machine.state()
        number = self._number_by_state.get(state)
        if number is None:
            number = self._number_by_state[state] = len(self.facts)
            self.facts.append(machine.facts())
            self._origins.append(origin)
        return number
