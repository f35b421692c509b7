"""Breadth-first search over all states of a scope, and the proof that every run of it ends.

A state is remembered by its 64-bit hash (two of n states share one with a chance of n² / 2⁶⁵: one in a million at six
million states). Fair moves are all that are no fault. They form no cycle, and a state without one is an end: so every
run ends whose messages are delivered and whose timers fire, in any order.
"""

from __future__ import annotations

import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from ..invariants import Violation
from .automaton import Edge
from .cluster import Cluster
from .state import Broken, Reached, Scope, State


@dataclass(slots=True)
class Found:
    """Result of a search."""

    scope: Scope
    num_states: int = 0
    num_moves: int = 0
    num_ends: int = 0
    depth: int = 0  # most moves from the beginning to a state, along a shortest path
    longest_run: int = 0  # most fair moves in a row
    is_closed: bool = False  # every reachable state was visited
    violation: Violation | None = None
    trace: tuple[str, ...] = ()  # shortest one that leads to the violation
    real_s: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)  # end states by the requests' outcomes
    receiver_edges: frozenset[Edge] = frozenset()
    sender_edges: frozenset[Edge] = frozenset()
    decided: int = 0  # different (machine state, event) pairs that production code decided


def search(
    scope: Scope,
    *,
    max_states: int = 20_000_000,
    max_s: float = float("inf"),
    heard: Callable[[Found], None] | None = None,
    is_reduced: bool = True,
) -> Found:
    """Visit every state, shortest paths first, until one breaks an invariant or a bound is reached.

    `heard` is called about once a second. Memory: about 150 bytes per state, and the states of two depths.
    """
    return _Search(scope, max_states, max_s, heard, is_reduced).run()


class _Search:
    def __init__(
        self, scope: Scope, max_states: int, max_s: float, heard: Callable[[Found], None] | None, is_reduced: bool
    ) -> None:
        self._reduced = is_reduced
        self._cluster = Cluster(scope)
        self._found = Found(scope)
        self._max_states, self._max_s, self._heard = max_states, max_s, heard
        self._numbers: dict[int, int] = {}
        self._parents = array("I")
        self._sources = array("I")  # of fair moves, in the order of the search
        self._targets = array("I")
        self._is_end = bytearray()

    def run(self) -> Found:
        found, began_s = self._found, time.perf_counter()
        said_s = began_s
        try:
            first = self._cluster.first()
        except Violation as violation:
            found.violation = violation
            return found
        self._add(first, 0)
        frontier = [(0, first)]
        while frontier and not found.violation:
            following: list[tuple[int, State]] = []
            for number, state in frontier:
                self._expand(number, state, following)
                now_s = time.perf_counter()
                if self._heard is not None and now_s - said_s >= 1.0:
                    said_s, found.real_s = now_s, now_s - began_s
                    self._heard(found)
                if found.violation or found.num_states >= self._max_states or now_s - began_s > self._max_s:
                    following = []
                    break
            else:
                frontier = following
                found.depth += bool(following)
                found.is_closed = not following
                continue
            break
        found.is_closed &= found.violation is None
        found.decided = sum(automaton.num_steps for automaton in self._cluster.automata.values())
        found.receiver_edges = frozenset().union(*(task.edges for task in self._cluster.tasks.values()))
        found.sender_edges = frozenset(self._cluster.job.edges)
        if found.is_closed:
            self._check_that_all_ends()
        found.real_s = time.perf_counter() - began_s
        return found

    def _add(self, state: State, parent: int) -> tuple[int, bool]:
        known = self._numbers.setdefault(hash(state), len(self._parents))
        if known < len(self._parents):
            return known, False
        self._parents.append(parent)
        is_end = self._cluster.is_end(state)
        self._is_end.append(is_end)
        self._found.num_states += 1
        if is_end:
            self._found.num_ends += 1
            outcomes = self._cluster.router.facts[state.router][0]
            self._found.outcomes.update(str(outcome) for outcome in outcomes)
        return known, True

    def _expand(self, number: int, state: State, following: list[tuple[int, State]]) -> None:
        if self._is_end[number]:
            return
        found = self._found
        ample = None if state.faults_left or not self._reduced else self._ample(state)
        steps = iter(ample or self._cluster.steps(state))
        while True:
            try:
                _, is_fault, reached = next(steps)
            except StopIteration:
                return
            except Broken as broken:
                self._report(number, broken.label, broken.violation)
                return
            found.num_moves += 1
            target, is_new = self._add(reached, number)
            if not is_fault:
                self._sources.append(number)
                self._targets.append(target)
            if is_new:
                following.append((target, reached))

    def _ample(self, state: State) -> list[Reached] | None:
        """Moves that stand for all others of the state; None: all are needed."""
        return self._cluster.ample(state) if len(state.tasks) > 1 else None

    # ------------------------------------------------------------------ everything ends

    def _check_that_all_ends(self) -> None:
        """Remove states whose fair moves all lead to removed ones, ends first; none may be left."""
        num_states = len(self._parents)
        left = array("I", bytes(4 * num_states))  # fair moves of each state that are not removed
        for source in self._sources:
            left[source] += 1
        starts = array("I", bytes(4 * (num_states + 1)))
        for target in self._targets:
            starts[target + 1] += 1
        for place in range(num_states):
            starts[place + 1] += starts[place]
        incoming, cursor = array("I", bytes(4 * len(self._targets))), array("I", starts)
        for source, target in zip(self._sources, self._targets, strict=True):
            incoming[cursor[target]] = source
            cursor[target] += 1
        lengths = array("I", bytes(4 * num_states))
        todo = [place for place in range(num_states) if not left[place]]
        for place in todo:
            if not self._is_end[place]:
                self._report(place, "nothing happens any more", Violation("R7", "a state without an end"))
                return
        num_removed = 0
        while todo:
            place = todo.pop()
            num_removed += 1
            for source in incoming[starts[place] : starts[place + 1]]:
                lengths[source] = max(lengths[source], lengths[place] + 1)
                left[source] -= 1
                if not left[source]:
                    todo.append(source)
        if num_removed < num_states:
            place = next(place for place in range(num_states) if left[place])
            self._report(place, "the same states come again and again", Violation("R7", "a run that does not end"))
            return
        self._found.longest_run = max(lengths, default=0)

    # ------------------------------------------------------------------ traces

    def _report(self, number: int, last: str, violation: Violation) -> None:
        self._found.violation, self._found.is_closed = violation, False
        path = [number]
        while path[-1]:
            path.append(self._parents[path[-1]])
        path.reverse()
        labels = []
        state = self._cluster.first()
        by_hash = {number: value for value, number in self._numbers.items() if number in set(path)}
        for step in path[1:]:
            for label, _, reached in self._steps_before_a_break(state):
                if hash(reached) == by_hash[step]:
                    labels.append(label)
                    state = reached
                    break
        self._found.trace = (*labels, last)

    def _steps_before_a_break(self, state: State) -> Iterator[Reached]:
        try:
            yield from self._cluster.steps(state)
        except Broken:
            return
