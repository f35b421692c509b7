"""When a decode worker makes a paired channel, and who is told of it."""

from collections import Counter

import pytest

from twostroke.decode_worker.paired_peers import JOINING, TOO_MANY, PairedChannels, PairShape
from twostroke.protos import handover_pb2 as pb

RETRY_S = 7.0


class ManualClock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.at_s = 100.0

    def now_s(self) -> float:
        return self.at_s

    def advance(self, seconds) -> None:
        self.at_s += seconds


class End:
    """An end that is open when a test says so."""

    is_open = False


class Channels(PairedChannels):
    """Two channels at most; what would be served is noted."""

    def __init__(self, clock) -> None:
        size = PairShape(2, 100)
        super().__init__(clock, Counter(), shape=size, max_bytes=500, worker_id="d", retry_s=RETRY_S)
        self.served, self.soon = [], []

    def _serve(self, peer) -> None:
        self.served.append(peer)

    def _soon(self, act) -> None:
        self.soon.append(act)

    def open(self, peer) -> End:
        end = End()
        self.made(peer, end)
        end.is_open = True
        self.opened(peer)
        return end


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
def channels(clock):
    return Channels(clock)


def test_the_first_hand_over_begins_a_channel_and_goes_without_it(channels):
    assert channels.get("p0") is None
    assert channels.get("p0") is None
    assert channels.served == ["p0"]
    assert channels.why_none("p0") == JOINING
    end = channels.open("p0")
    assert channels.get("p0") is end
    assert channels.num_open == channels.num_channels == 1


def test_a_channel_that_ended_is_made_again_after_a_while(channels, clock):
    channels.get("p0")
    channels.open("p0").is_open = False
    assert channels.get("p0") is None
    assert channels.num_channels == 1, "the library may still reach its memory"
    channels.over("p0", "an error")
    assert channels.why_none("p0") == "an error"
    assert channels.get("p0") is None
    assert channels.served == ["p0"]
    clock.advance(RETRY_S)
    assert channels.get("p0") is None
    assert channels.served == ["p0", "p0"]


def test_memory_bounds_the_channels_that_are_made_open_or_not_let_go(channels):
    for peer in ("p0", "p1", "p2"):
        channels.get(peer)
    assert channels.served == ["p0", "p1"]
    assert channels.why_none("p2") == TOO_MANY
    channels.over("p0", "gone")
    channels.get("p2")
    assert channels.served == ["p0", "p1", "p2"]


def test_who_waits_for_a_channel_is_told_once_when_it_opens_or_fails(channels):
    told = []
    channels.get("p0")
    channels.get("p1")
    channels.when_known("p0", lambda: told.append("p0"))
    channels.when_known("p1", lambda: told.append("p1"))
    channels.when_known("p9", lambda: told.append("p9"))
    assert not told
    channels.soon.pop()()
    channels.open("p0")
    channels.over("p0", "later")
    channels.over("p1", "did not join")
    assert told == ["p9", "p0", "p1"]


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (None, "the peer knows no paired channels, or is gone"),
        (pb.PairMessage(refused=pb.PairRefused(reason="no memory")), "no memory"),
        (pb.PairMessage(ready=pb.PairReady(id=1)), "the peer did not accept"),
        (pb.PairMessage(accepted=pb.PairAccepted()), ""),
    ],
)
def test_only_an_accepted_hello_makes_a_channel(channels, answer, why):
    hello = channels.hello(5)
    assert (hello.number, hello.slots, hello.slot_bytes, hello.worker_id) == (5, 2, 100, "d")
    assert channels.why_not(answer) == why
