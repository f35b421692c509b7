from __future__ import annotations

import time

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from twostroke.kv.block import BlockIdentity, chain
from twostroke.router.routing.prefixes import PrefixMap

KEY = b"k" * 16
ROOT = b"r" * 16


def prompt_chain(blocks: int, branch: int = 0, shared: int = 0) -> list[BlockIdentity]:
    """Identities of a prompt; two branches share their first `shared` blocks."""
    tokens = [7 if i < shared * 16 else 100 + branch for i in range(blocks * 16)]
    return chain(KEY, ROOT, tokens)


def test_finds_the_longest_prefix_of_every_worker() -> None:
    prefixes = PrefixMap()
    blocks = prompt_chain(9)
    for worker, count in (("a", 9), ("b", 4), ("c", 1), ("d", 0)):
        prefixes.join(worker)
        assert prefixes.snapshot(worker, 1, b"".join(blocks[:count]), last=True)
    assert prefixes.held(blocks) == {"a": 9, "b": 4, "c": 1}
    assert prefixes.held(blocks[:3]) == {"a": 3, "b": 3, "c": 1}
    assert prefixes.held([]) == {}


def test_a_gap_takes_the_worker_out_until_its_next_snapshot() -> None:
    prefixes = PrefixMap()
    blocks = prompt_chain(4)
    prefixes.join("a")
    prefixes.snapshot("a", 1, b"".join(blocks[:2]), last=True)
    assert not prefixes.delta("a", 3, blocks[2], b"")
    assert prefixes.needs_snapshot("a")
    assert prefixes.held(blocks) == {}
    assert not prefixes.delta("a", 4, blocks[3], b"")  # still only a snapshot helps
    assert prefixes.snapshot("a", 5, blocks[0], last=True)
    assert prefixes.held(blocks) == {"a": 1}


def test_a_lost_piece_of_a_snapshot_is_a_gap() -> None:
    prefixes = PrefixMap()
    blocks = prompt_chain(4)
    prefixes.join("a")
    assert prefixes.snapshot("a", 1, blocks[0], last=False)
    assert not prefixes.snapshot("a", 3, blocks[2], last=True)
    assert prefixes.held(blocks) == {}


def test_an_unasked_snapshot_replaces_everything() -> None:
    prefixes = PrefixMap()
    old, new = prompt_chain(5, branch=1), prompt_chain(5, branch=2)
    prefixes.join("a")
    prefixes.snapshot("a", 1, b"".join(old), last=True)
    assert prefixes.snapshot("a", 2, b"".join(new), last=True)
    assert prefixes.held(old) == {}
    assert prefixes.held(new) == {"a": 5}


def test_a_piece_that_comes_twice_is_no_other_snapshot() -> None:
    prefixes = PrefixMap()
    blocks = prompt_chain(4)
    prefixes.join("a")
    assert prefixes.snapshot("a", 1, b"".join(blocks[:3]), last=False)
    assert prefixes.snapshot("a", 2, blocks[3], last=True)
    assert not prefixes.snapshot("a", 2, blocks[3], last=True)
    assert prefixes.needs_snapshot("a"), "not what the second piece alone says"
    assert prefixes.believed("a") is None
    assert prefixes.snapshot("a", 3, b"".join(blocks), last=True)
    assert prefixes.believed("a") == frozenset(blocks)


def test_a_dead_workers_slot_is_not_reused_before_it_is_swept() -> None:
    prefixes = PrefixMap()
    blocks = prompt_chain(10)
    prefixes.join("dead")
    prefixes.snapshot("dead", 1, b"".join(blocks), last=True)
    prefixes.leave("dead")
    prefixes.join("new")
    prefixes.snapshot("new", 1, b"", last=True)
    assert prefixes.held(blocks) == {}
    assert not prefixes.sweep(4)
    assert len(prefixes) == 6
    assert prefixes.sweep(100)
    prefixes.join("newer")
    prefixes.snapshot("newer", 1, b"", last=True)
    assert prefixes.held(blocks) == {}
    prefixes.check_integrity()


def test_predictions_count_for_siblings_and_expire() -> None:
    prefixes = PrefixMap(prediction_ttl_s=5.0)
    blocks = prompt_chain(8)
    prefixes.join("a")
    prefixes.snapshot("a", 1, b"".join(blocks[:2]), last=True)
    prefixes.predict(["a"], blocks, now_s=100.0)
    assert prefixes.expected(blocks, 101.0) == {"a": 8}
    assert prefixes.held(blocks) == {"a": 2}
    assert prefixes.expected(blocks, 104.9) == {"a": 8}
    assert prefixes.expected(blocks, 111.0) == {"a": 2}


def test_a_successor_does_not_inherit_predictions_through_its_slot() -> None:
    prefixes = PrefixMap(prediction_ttl_s=5.0)
    blocks = prompt_chain(8)
    prefixes.join("a")
    prefixes.predict(["a"], blocks, now_s=0.0)
    prefixes.leave("a")
    assert prefixes.sweep(10)
    prefixes.join("b")
    assert prefixes.expected(blocks, 1.0) == {}


def test_the_bound_forgets_and_never_claims_too_much() -> None:
    prefixes = PrefixMap(max_entries=64)
    chains = [prompt_chain(16, branch) for branch in range(8)]
    prefixes.join("a")
    prefixes.snapshot("a", 1, b"", last=True)
    for number, blocks in enumerate(chains):
        prefixes.delta("a", number + 2, b"".join(blocks), b"")
        prefixes.check_integrity()
    assert prefixes.num_dropped > 0
    assert prefixes.held(chains[-1]) == {"a": 16}


def test_a_match_of_512_blocks_and_16_workers_is_quick() -> None:
    prefixes = PrefixMap()
    blocks = prompt_chain(512)
    for number in range(16):
        prefixes.join(f"w{number}")
        prefixes.snapshot(f"w{number}", 1, b"".join(blocks[: 32 * number]), last=True)
    prefixes.held(blocks)
    began = time.perf_counter()
    for _ in range(100):
        prefixes.held(blocks)
    assert (time.perf_counter() - began) / 100 < 0.005  # about 20 µs on a quiet machine


def test_a_malformed_event_is_a_gap() -> None:
    prefixes = PrefixMap()
    prefixes.join("a")
    prefixes.snapshot("a", 1, b"", last=True)
    assert not prefixes.delta("a", 2, b"short", b"")
    assert prefixes.num_gaps == 1


WORKERS = ["a", "b", "c"]
TREE = [prompt_chain(6, branch, shared) for branch, shared in ((0, 0), (1, 3), (2, 3), (3, 5))]


class PrefixMapAgainstSets(RuleBasedStateMachine):
    """The map must answer as a dict of sets does, through joins, deaths, gaps, resyncs and slices of sweeping."""

    MAX_ENTRIES = 10_000

    def __init__(self) -> None:
        super().__init__()
        self.map = PrefixMap(max_entries=self.MAX_ENTRIES, prediction_ttl_s=5.0)
        self.truth: dict[str, set[bytes]] = {}  # what the worker holds
        self.heard: dict[str, bool] = {}  # without a gap since a snapshot
        self.sequence: dict[str, int] = {}
        self.predicted: list[tuple[float, str, int, int, int]] = []
        self.life: dict[str, int] = {}
        self.now_s = 0.0

    worker = st.sampled_from(WORKERS)
    branch = st.integers(0, len(TREE) - 1)
    count = st.integers(0, 6)

    @rule(worker=worker)
    def join(self, worker: str) -> None:
        self.map.join(worker)
        self.truth[worker], self.heard[worker], self.sequence[worker] = set(), False, 0
        self.life[worker] = self.life.get(worker, 0) + 1

    @rule(worker=worker)
    def leave(self, worker: str) -> None:
        self.map.leave(worker)
        self.truth.pop(worker, None)

    @rule(worker=worker, in_pieces=st.booleans())
    def snapshot(self, worker: str, in_pieces: bool) -> None:
        if worker not in self.truth:
            return
        ordered = [b for blocks in TREE for b in blocks if b in self.truth[worker]]
        ordered = list(dict.fromkeys(ordered))
        pieces = [ordered[:3], ordered[3:]] if in_pieces else [ordered]
        for number, piece in enumerate(pieces):
            self.sequence[worker] += 1
            last = number == len(pieces) - 1
            assert self.map.snapshot(worker, self.sequence[worker], b"".join(piece), last)
        self.heard[worker] = True

    @rule(worker=worker, branch=branch, count=count, lost=st.integers(0, 9))
    def store(self, worker: str, branch: int, count: int, lost: int) -> None:
        if worker not in self.truth:
            return
        new = [b for b in TREE[branch][:count] if b not in self.truth[worker]]
        self.truth[worker].update(new)
        self._event(worker, new, [], lost == 0)

    @rule(worker=worker, branch=branch, count=count, lost=st.integers(0, 9))
    def remove(self, worker: str, branch: int, count: int, lost: int) -> None:
        if worker not in self.truth:
            return
        gone = {b for b in TREE[branch][count:] if b in self.truth[worker]}
        # descendants go with their parents
        for blocks in TREE:
            for index, block in enumerate(blocks):
                if block in gone:
                    gone.update(b for b in blocks[index:] if b in self.truth[worker])
        self.truth[worker] -= gone
        self._event(worker, [], sorted(gone), lost == 0)

    def _event(self, worker: str, stored: list[BlockIdentity], removed: list[bytes], lost: bool) -> None:
        self.sequence[worker] += 1
        if lost:
            if self.heard[worker]:
                self.sequence[worker] += 1  # the next one shows the gap
                assert not self.map.delta(worker, self.sequence[worker], b"", b"")
                self.heard[worker] = False
            return
        taken = self.map.delta(worker, self.sequence[worker], b"".join(stored), b"".join(removed))
        assert taken == self.heard[worker]

    @rule(worker=worker, branch=branch, count=count)
    def predict(self, worker: str, branch: int, count: int) -> None:
        self.map.predict([worker], TREE[branch][:count], self.now_s)
        if worker in self.truth:
            self.predicted.append((self.now_s, worker, self.life[worker], branch, count))

    @rule(seconds=st.sampled_from([0.5, 3.0, 12.0]))
    def time_passes(self, seconds: float) -> None:
        self.now_s += seconds

    @rule(count=st.integers(1, 8))
    def sweep(self, count: int) -> None:
        self.map.sweep(count)

    @invariant()
    def answers_like_sets(self) -> None:
        self.map.check_integrity()
        for branch, blocks in enumerate(TREE):
            expected = {}
            for worker, held in self.truth.items():
                length = 0
                while length < len(blocks) and blocks[length] in held:
                    length += 1
                if length and self.heard[worker]:
                    expected[worker] = length
            assert self.map.held(blocks) == expected
            self._check_predictions(branch, blocks, expected)

    def _check_predictions(self, branch: int, blocks: list[BlockIdentity], held: dict[str, int]) -> None:
        answer = self.map.expected(blocks, self.now_s)
        for worker in WORKERS:
            lowest = highest = held.get(worker, 0)
            for at_s, who, life, other, count in self.predicted:
                if who != worker or worker not in self.truth or life != self.life[worker]:
                    continue
                shared = sum(1 for x, y in zip(blocks, TREE[other][:count], strict=False) if x == y)
                if self.now_s - at_s < 5.0:
                    lowest = max(lowest, shared)
                if self.now_s - at_s <= 10.0:
                    highest = max(highest, shared)
            if self.now_s and any(who == worker for _, who, *_ in self.predicted):
                # A resync takes a new slot and loses predictions: fewer is allowed, more never is.
                assert held.get(worker, 0) <= answer.get(worker, 0) <= highest
            elif not self.predicted:
                assert answer.get(worker, 0) == lowest


PrefixMapAgainstSets.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPrefixMapAgainstSets = PrefixMapAgainstSets.TestCase


@pytest.mark.parametrize("workers", [1, 3, 70])
def test_any_number_of_workers(workers: int) -> None:
    prefixes = PrefixMap()
    blocks = prompt_chain(5)
    for number in range(workers):
        prefixes.join(f"w{number}")
        prefixes.snapshot(f"w{number}", 1, b"".join(blocks[: number % 6]), last=True)
    assert prefixes.held(blocks) == {f"w{n}": n % 6 for n in range(workers) if n % 6}
