"""The order in which a turn carries out operations and tells events, and what is told where the store refuses."""

from __future__ import annotations

from typing import Any

from twostroke.core.errors import KvCorrupted
from twostroke.core.request import FinishReason, SequenceKey
from twostroke.engine.link.messages import BlocksFetched, Bound, Ended, KvRead
from twostroke.engine.plan import StepPlan
from twostroke.engine.store_ops import FetchOp, ReadOp, SwapOutOp
from twostroke.engine.turn import Turn

KEY = SequenceKey("r", 0)
READ = ReadOp(KEY, 0, 16, (1,), (0,))
FETCH = FetchOp(9, 0, 16, (1,), (0,))
COPY = SwapOutOp(KEY, 0, 16, (1,), (0,), (2,), (0,))
PLAN = StepPlan(1, ())


class Core:
    """Says what the test wants said."""

    def __init__(self, *said: Any) -> None:
        self.said = list(said)

    def handle(self, command: Any, now_s: float) -> list[Any]:
        return self.said

    def tick(self, now_s: float) -> list[Any]:
        return []

    def plan(self, now_s: float) -> StepPlan:
        return PLAN

    def drain(self) -> list[Any]:
        return self.said

    def fail(self, key: SequenceKey, code: str, message: str) -> list[Any]:
        return [Ended(key, FinishReason.ERROR, code)]


class Store:
    def __init__(self, *, refuses: bool = False) -> None:
        self.refuses, self.done = refuses, []

    def read(self, op: Any) -> tuple[()]:
        self.done.append(op)
        if self.refuses:
            raise KvCorrupted("not sealed")
        return ()

    def swap_out(self, op: Any) -> None:
        self.done.append(op)


def turn(core: Core, store: Store) -> tuple[Turn, list[Any], list[Any]]:
    heard: list[Any] = []
    refused: list[Any] = []
    made = Turn(core, store, heard.extend, lambda op, _: refused.append(op))  # type: ignore[arg-type]
    return made, heard, refused


def test_whoever_waits_for_planes_hears_that_there_are_none_and_then_the_end() -> None:
    made, heard, refused = turn(Core(Bound(KEY), READ, FETCH, Bound(KEY)), Store(refuses=True))
    made.take(None, 0.0)  # type: ignore[arg-type]
    ended = Ended(KEY, FinishReason.ERROR, "kv_corrupted")
    assert heard == [Bound(KEY), KvRead(KEY, 0, 16, None), ended, BlocksFetched(9, 0, ()), Bound(KEY)]
    assert refused == [READ, FETCH]


def test_what_was_decided_while_planning_is_copied_before_the_step() -> None:
    store = Store()
    made, _, _ = turn(Core(COPY), store)
    assert made.plan(0.0) is PLAN
    assert store.done == [COPY]
