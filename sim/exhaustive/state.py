"""Values of the search: the state of a cluster, its scope, and moves. Knows no machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from ...core.request import FinishReason
from ..invariants import Violation
from .given import PROMPT_TOKENS, UNIT_TOKENS

if TYPE_CHECKING:
    from .edit import Edit

NEEDED = -(-PROMPT_TOKENS // UNIT_TOKENS)  # blocks of a request; the answer fits in the last one
POOL = 3  # of every worker: room for one request, not for two
ALL_UNITS = (1 << NEEDED) - 1
MAX_KNOWN_STEPS = 500_000
UNOPENED, GONE = -1, -2  # numbers for machines that are not there

# ------------------------------------------------------------------ values of a state


class Link(NamedTuple):
    """One hand-over stream of a task, with the job at its other end."""

    prefill: int
    up: tuple[int, ...] = ()  # messages under way, by number
    down: tuple[int, ...] = ()
    is_heard: bool = True  # decode has not closed it
    up_end: int = 0  # 1: the direction ends after its messages; 2: the end arrived
    down_end: int = 0
    job: int = UNOPENED
    stage: str = ""  # of the job's sequence in the engine; empty: there is none
    blocks: tuple[int, ...] = ()
    is_rotten: bool = False  # every frame arrives damaged


class Task(NamedTuple):
    """The run of one order on a decode worker, its sequence in the engine, and its streams."""

    decode: int
    request: int
    epoch: int
    session: int
    task: int  # GONE: its worker died
    peers: tuple[int, ...]
    resumed: int = 0  # tokens that an earlier dispatch gave to the client
    stage: str = ""
    blocks: tuple[int, ...] = ()
    units: int = 0  # bits of the hash blocks that are stored
    writes: tuple[int, ...] = ()  # hash blocks that are on their way into the store
    emitted: int = 0  # tokens that are known here before the engine samples any, `resumed` ones included
    reason: FinishReason = FinishReason.CANCELLED
    links: tuple[Link | None, ...] = ()


class State(NamedTuple):
    """State of the cluster."""

    faults_left: int
    router: int
    services: tuple[int, ...]
    sessions: tuple[int, ...]  # by decode worker: number of the session; negative: it broke
    orders: tuple[tuple[int, ...], ...]  # on the way to each decode worker
    outputs: tuple[tuple[int, ...], ...]  # on the way from it
    dead_decode: tuple[int, ...]  # 0 alive, 1 crashed, 2 vanished without a word; +10: the router knows
    dead_prefill: tuple[int, ...]
    is_session_lossy: bool  # an order or an output was lost: neither side can know before the deadline
    tasks: tuple[Task, ...]


@dataclass(frozen=True, slots=True)
class Scope:
    """How many of each there are."""

    requests: int = 1
    prefill: int = 1
    decode: int = 1
    faults: int = 1
    is_crowded: bool = False  # requests outside the scope take room and turns: every answer of an engine may come late

    @classmethod
    def parse(cls, text: str) -> Scope:
        """A scope from its text, such as "2x1x1x1" or "1x1x1x1+".

        Raises:
            ValueError: the text is no scope.
        """
        parts = text.removesuffix("+").split("x")
        if len(parts) != 4 or not all(part.isdecimal() for part in parts):
            raise ValueError(f"{text!r} is no scope; give four numbers, e.g. 2x1x1x1, or 1x1x1x1+")
        requests, prefill, decode, faults = map(int, parts)
        return cls(requests, prefill, decode, faults, text.endswith("+"))

    def __str__(self) -> str:
        return f"{self.requests}x{self.prefill}x{self.decode}x{self.faults}" + ("+" if self.is_crowded else "")


class Move(NamedTuple):
    """An event of a state."""

    label: str
    is_fault: bool
    act: Callable[[Edit], None]


class TaskMove(NamedTuple):
    """An event of one task, wherever it stands in the state."""

    label: str
    is_fault: bool
    act: Callable[[Edit, int], None]


class Reached(NamedTuple):
    """An event, and the state that it led to."""

    label: str
    is_fault: bool
    state: State


class Broken(Exception):
    """A move breaks an invariant."""

    def __init__(self, label: str, violation: Violation) -> None:
        super().__init__(f"{label}: {violation}")
        self.label = label
        self.violation = violation


class Step(NamedTuple):
    """A move of a task, and its result as far as it is known."""

    label: str
    is_fault: bool
    act: Callable[[Edit, int], None]
    after: Task | None  # None: it touches more than its task
    says: tuple[int, ...]  # outputs that it adds
    place: int = 0
