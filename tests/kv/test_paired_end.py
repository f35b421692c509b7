"""Both ends of a paired channel on one loop, under a library that does what a script says."""

import asyncio

import pytest
from support.engines.scripted_pair import Wire, pipes

from twostroke.kv.handover.paired_library import Patience
from twostroke.kv.handover.transports.paired_end import PairedDestination, PairedSource, PairSettings
from twostroke.protos import handover_pb2 as pb

SLOTS, SLOT_BYTES, WAIT_S = 3, 1000, 20.0


class Both:
    """The two ends, and the tasks that serve them."""

    def __init__(self, operation_s: float = WAIT_S, **script) -> None:
        self.wire = Wire(**script)
        settings = PairSettings("", Patience(WAIT_S, operation_s), lambda backend, store, host: self.wire.join)
        self.source = PairedSource(SLOTS, SLOT_BYTES, settings)
        self.destination = PairedDestination(7, SLOTS, SLOT_BYTES, settings)
        self.near, self.far = pipes()
        self.num_opened = 0
        self.tasks = [
            asyncio.create_task(self._serve(self.source.run(self.near), self.near)),
            asyncio.create_task(self._serve(self.destination.run(self.far, self._count), self.far)),
        ]

    @staticmethod
    async def _serve(life, pipe) -> None:
        """As the owners do: the stream ends with the end."""
        try:
            await life
        finally:
            pipe.close()

    def _count(self) -> None:
        self.num_opened += 1

    async def until(self, holds) -> None:
        async with asyncio.timeout(WAIT_S):
            while not holds():
                await asyncio.sleep(0.001)

    async def opened(self) -> "Both":
        await self.until(lambda: self.source.is_open and self.destination.is_open)
        return self

    async def taken(self, key: int, transfer: int) -> bytes | None:
        """What a claim gets."""
        got: asyncio.Future[memoryview | None] = asyncio.get_running_loop().create_future()
        self.destination.claim(key, transfer, got.set_result)
        assert not got.done(), "inside the call"
        async with asyncio.timeout(WAIT_S):
            planes = await got
        return None if planes is None else bytes(planes)

    async def over(self) -> None:
        async with asyncio.timeout(WAIT_S):
            await asyncio.gather(*self.tasks)


@pytest.fixture
async def both():
    made = Both()
    yield made
    made.source.stop("the test is over")
    made.destination.stop("the test is over")
    made.wire.let_go()
    await made.over()


async def test_planes_come_in_parts_through_few_slots_and_are_claimed_before_or_after(both):
    await both.opened()
    assert both.num_opened == 1
    key = both.destination.open_key(20)
    sent = [both.source.send(key, [bytes([n]) * 300, memoryview(bytes([n + 1]) * n)], 300 + n) for n in range(12)]
    assert sent == list(range(1, 13))
    for n in range(12):
        assert await both.taken(key, n + 1) == bytes([n]) * 300 + bytes([n + 1]) * n
    assert both.source.transfers.quarantined == both.destination.transfers.quarantined == frozenset()
    assert sorted(both.source.transfers.usable_slots) == list(range(SLOTS))


async def test_two_hand_overs_share_a_channel_and_what_nobody_wants_is_dropped(both):
    await both.opened()
    one, two = both.destination.open_key(4), both.destination.open_key(4)
    both.source.send(one, [b"a"], 1)
    both.source.send(two, [b"b"], 1)
    both.destination.close_key(one)
    both.destination.close_key(one)
    for _ in range(20):
        both.source.send(one, [b"c"], 1)
    last = both.source.send(two, [b"d"], 1)
    assert await both.taken(two, 2) == b"b"
    assert await both.taken(two, last) == b"d"
    assert both.destination.is_open


async def test_a_header_that_comes_twice_waits_for_nothing(both):
    await both.opened()
    key = both.destination.open_key(4)
    both.wire.holds_from = 1
    transfer = both.source.send(key, [b"m"], 1)
    first = asyncio.create_task(both.taken(key, transfer))
    await asyncio.sleep(0)
    assert await both.taken(key, transfer) is None
    await both.until(lambda: both.source.transfers.quarantined and both.destination.transfers.quarantined)
    both.wire.holds_from = None
    both.wire.move()
    assert await first == b"m"
    assert await both.taken(key, transfer) is None


async def test_planes_that_fit_no_slot_take_the_stream(both):
    await both.opened()
    key = both.destination.open_key(4)
    assert both.source.send(key, [bytes(SLOT_BYTES + 1)], SLOT_BYTES + 1) is None
    assert both.source.send(key, [], 0) is None
    assert both.source.send(key, [b"e"], 1) == 1


async def test_a_library_that_hangs_at_its_start_is_given_up_and_keeps_its_memory_until_it_lets_go():
    both = Both(hangs_at_init=True)
    both.wire.holds_abort = True
    await asyncio.sleep(0)
    assert not both.source.is_open
    assert both.source.send(1, [b"f"], 1) is None
    both.source.stop("not joined in time")
    await both.until(lambda: both.destination.reason)
    assert not any(task.done() for task in both.tasks), "the library may still reach the memory"
    both.wire.let_go()
    await both.over()
    assert both.source.reason == "not joined in time"
    assert both.num_opened == 0


async def test_an_error_of_the_library_fails_what_is_under_way_and_ends_both(both):
    await both.opened()
    key = both.destination.open_key(9)
    both.wire.holds_from = 2
    first, second, third = (both.source.send(key, [b"g"], 1) for _ in range(3))
    assert await both.taken(key, first) == b"g"
    claim = asyncio.create_task(both.taken(key, second))
    await both.until(lambda: len(both.destination.transfers.quarantined) == 2)
    both.wire.holds_abort = True
    both.wire.ranks[0].fail("a scripted error")
    assert await claim is None
    assert await both.taken(key, third) is None
    assert both.source.send(key, [b"h"], 1) is None
    await both.until(lambda: not both.destination.is_open)
    assert len(both.source.transfers.quarantined) == len(both.destination.transfers.quarantined) == 2, (
        "not before the abort"
    )
    assert not any(task.done() for task in both.tasks)
    both.wire.let_go()
    await both.over()
    assert both.source.reason == "a scripted error"
    assert both.destination.reason == "the peer ended it: a scripted error"
    assert both.source.transfers.quarantined == both.destination.transfers.quarantined == frozenset()


async def test_a_peer_that_dies_in_the_middle_of_a_transfer_fails_it(both):
    await both.opened()
    key = both.destination.open_key(9)
    both.wire.holds_from = 1
    transfer = both.source.send(key, [b"i"], 1)
    claim = asyncio.create_task(both.taken(key, transfer))
    await both.until(lambda: both.destination.transfers.quarantined)
    both.near.close()
    assert await claim is None
    await both.over()
    assert await both.taken(key, transfer + 1) is None, "its header may come later than the end"


async def test_hand_overs_that_end_as_they_learn_of_a_failure_disturb_no_other(both):
    await both.opened()
    both.wire.holds_from = 1
    keys, told = [both.destination.open_key(9) for _ in range(3)], []
    for key in keys:

        def took(planes, key=key):
            told.append((key, planes))
            both.destination.close_key(key)
            if key == keys[0]:
                both.destination.open_key(9)

        both.destination.claim(key, both.source.send(key, [b"l"], 1), took)
    both.near.close()
    await both.over()
    assert told == [(key, None) for key in keys]


async def test_what_is_announced_before_the_ranks_have_joined_here_waits():
    both = Both(late_rank=1)
    await both.until(lambda: both.source.is_open)
    key = both.destination.open_key(9)
    sent = [both.source.send(key, [bytes([n])], 1) for n in range(SLOTS)]
    await both.until(lambda: len(both.destination.transfers._early) == SLOTS)
    both.wire.open_late()
    assert [await both.taken(key, transfer) for transfer in sent] == [b"\0", b"\1", b"\2"]
    both.source.stop("the test is over")
    await both.over()


async def test_a_transfer_that_hangs_ends_the_channel_after_the_patience():
    both = await Both(operation_s=0.05).opened()
    key = both.destination.open_key(9)
    both.wire.holds_from = 1
    assert await both.taken(key, both.source.send(key, [b"j"], 1)) is None
    await both.over()
    reasons = both.source.reason + both.destination.reason
    assert "did not complete within 0.05 s" in reasons


@pytest.mark.parametrize(
    "word",
    [
        b"\xff\xff",
        pb.PairMessage(hello={}).SerializeToString(),
        pb.PairMessage(announce=pb.PairAnnounce(id=1, num_bytes=1)).SerializeToString(),
        pb.PairMessage(ready=pb.PairReady(id=5)).SerializeToString(),
    ],
)
async def test_a_word_out_of_place_ends_the_channel(both, word):
    await both.opened()
    await both.far.send(word)  # to the source
    await both.over()
    assert both.source.reason
    assert both.destination.reason


async def test_a_peer_that_sends_without_end_for_one_hand_over_is_cut_off(both):
    await both.opened()
    key = both.destination.open_key(2)
    for _ in range(4):
        both.source.send(key, [b"k"], 1)
    await both.over()
    assert both.destination.reason == "more than 2 transfers of a hand-over wait for their headers"
