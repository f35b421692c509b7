"""Both ends of a two-rank link, by hand and over random schedules: order, Ready before any post, quarantine, abort."""

import random

import pytest

from twostroke.kv.handover.paired_link import (
    Abort,
    Announce,
    Deliver,
    DestinationEnd,
    Free,
    LinkState,
    Post,
    Ready,
    SourceEnd,
)

PATIENCE_S = 2.0


def test_nothing_is_posted_before_both_ends_are_ready() -> None:
    source, destination = SourceEnd(PATIENCE_S), DestinationEnd(1, 100, PATIENCE_S)
    assert source.offer(5, 80) == [Announce(1, 80)]
    assert source.quarantined == frozenset()
    assert destination.announced(1, 80, 0.0) == [Post(1, 0, 80), Ready(1)]
    assert source.ready(1, 0.0) == [Post(1, 5, 80)]
    assert (source.quarantined, destination.quarantined) == ({5}, {0})
    assert source.completed(1) == [Free(5)]
    assert destination.completed(1) == [Deliver(1, 0, 80)]
    assert source.quarantined == destination.quarantined == frozenset()


def test_a_transfer_without_a_free_slot_waits_for_one() -> None:
    destination = DestinationEnd(1, 100, PATIENCE_S)
    destination.announced(1, 10, 0.0)
    assert destination.announced(2, 20, 0.0) == []
    destination.completed(1)
    assert destination.release(0, 0.0) == [Post(2, 0, 20), Ready(2)]


@pytest.mark.parametrize(("transfer", "size"), [(2, 10), (0, 10), (1, 101), (1, 0)])
def test_an_announcement_out_of_order_or_of_a_wrong_size_aborts(transfer: int, size: int) -> None:
    destination = DestinationEnd(1, 100, PATIENCE_S)
    (abort,) = destination.announced(transfer, size, 0.0)
    assert isinstance(abort, Abort)
    assert destination.announced(1, 10, 0.0) == []


def test_more_announcements_than_slots_abort() -> None:
    destination = DestinationEnd(2, 100, PATIENCE_S)
    for transfer in range(1, 5):
        destination.announced(transfer, 1, 0.0)
    assert destination.state is LinkState.OPEN
    assert any(isinstance(action, Abort) for action in destination.announced(5, 1, 0.0))


def test_a_ready_that_was_not_announced_first_aborts_and_frees_what_is_not_posted() -> None:
    source = SourceEnd(PATIENCE_S)
    source.offer(0, 1)
    source.offer(1, 1)
    actions = source.ready(2, 0.0)
    assert isinstance(actions[0], Abort)
    assert actions[1:] == [Free(0), Free(1)]


def test_posted_memory_is_in_quarantine_until_the_abort_is_done() -> None:
    source = SourceEnd(PATIENCE_S)
    for slot in (0, 1):
        source.offer(slot, 1)
    source.ready(1, 0.0)
    assert source.failed("the stream ended") == [Abort("the stream ended"), Free(1)]
    assert source.completed(1) == []  # too late to count: the library may say anything now
    assert source.quarantined == {0}
    assert source.failed("again") == []
    assert source.offer(2, 1) == [Free(2)]
    assert source.aborted() == [Free(0)]
    assert source.state is LinkState.GONE


def test_an_operation_that_hangs_aborts_after_the_patience() -> None:
    destination = DestinationEnd(2, 100, PATIENCE_S)
    assert destination.next_deadline_s is None
    destination.announced(1, 1, 10.0)
    destination.announced(2, 1, 11.0)
    assert destination.next_deadline_s == 12.0
    assert destination.tick(11.99) == []
    assert isinstance(destination.tick(12.0)[0], Abort)
    assert destination.quarantined == {0, 1}
    assert destination.aborted() == [Free(0), Free(1)]


class World:
    """Two ends, an ordered control stream, and a library that completes what both have posted."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.source, self.destination = SourceEnd(PATIENCE_S), DestinationEnd(3, 100, PATIENCE_S)
        self.down, self.up = [], []
        self.posted = {"source": {}, "destination": {}}
        self.free_at_source = {0, 1, 2, 3}
        self.held, self.delivered, self.aborting = [], [], set()

    def carry(self, side: str, actions) -> None:
        for action in actions:
            match action:
                case Announce():
                    self.down.append(action)
                case Ready():
                    assert action.id in self.posted["destination"], "Ready before the receive is posted"
                    self.up.append(action)
                case Post(transfer):
                    if side == "source":
                        assert transfer in self.posted["destination"], "a send without a receive"
                    before = list(self.posted[side])
                    assert before == sorted(before)
                    assert not before or transfer > before[-1], "out of order"
                    self.posted[side][transfer] = action
                case Deliver(transfer, slot):
                    self.delivered.append(transfer)
                    self.held.append(slot)
                case Free(slot):
                    if side == "source":
                        assert slot not in self.free_at_source
                        self.free_at_source.add(slot)
                case Abort():
                    self.aborting.add(side)

    def step(self) -> None:
        chance = self.chance
        match chance.randrange(6):
            case 0 if self.free_at_source and len(self.source._announced) < 3:
                slot = self.free_at_source.pop()
                self.carry("source", self.source.offer(slot, chance.randint(1, 100)))
            case 1 if self.down:
                message = self.down.pop(0)
                self.carry("destination", self.destination.announced(message.id, message.num_bytes, 0.0))
            case 2 if self.up:
                self.carry("source", self.source.ready(self.up.pop(0).id, 0.0))
            case 3:
                both = sorted(self.posted["source"].keys() & self.posted["destination"].keys())
                if both:
                    self.complete(both[0])
            case 4 if self.held:
                self.carry("destination", self.destination.release(self.held.pop(0), 0.0))
            case 5 if chance.random() < 0.02:
                side, end = chance.choice([("source", self.source), ("destination", self.destination)])
                self.carry(side, end.failed("by chance"))

    def complete(self, transfer: int) -> None:
        for side, end in (("source", self.source), ("destination", self.destination)):
            del self.posted[side][transfer]
            self.carry(side, end.completed(transfer))

    def end(self) -> None:
        for side, end in (("source", self.source), ("destination", self.destination)):
            self.carry(side, end.failed("the end"))
            assert {post.slot for post in self.posted[side].values()} <= end.quarantined, "freed while posted"
            self.posted[side].clear()
            self.carry(side, end.aborted())


@pytest.mark.parametrize("seed", range(100))
def test_random_schedules_keep_order_and_free_every_slot(seed: int) -> None:
    world = World(random.Random(seed))
    for _ in range(300):
        world.step()
    world.end()
    assert world.free_at_source == {0, 1, 2, 3}
    assert world.delivered == list(range(1, len(world.delivered) + 1))
    assert world.delivered or world.aborting
