"""When a decode worker makes a paired channel, to how many peers, and how long it waits for one that is silent."""

import asyncio
from collections import Counter

import pytest
from support.engines.scripted_pair import Pipe, pipes

from twostroke.decode_worker import pairs as made_pairs
from twostroke.decode_worker.paired_peers import RETRY_S, TOO_MANY, PairShape
from twostroke.decode_worker.pairs import Pairs
from twostroke.protos import handover_pb2 as pb

WAIT_S = 60.0


class Calls:
    """Channels whose peers are the test's, and the clock of their owner."""

    def __init__(self, max_channels: int = 2) -> None:
        self.now = 100.0
        self.peers: list[tuple[str, Pipe]] = []
        shape = PairShape(2, 1000)
        self.pairs = Pairs(
            lambda number, shape: pytest.fail("no peer accepts"),
            self._open,
            self,  # type: ignore[arg-type]
            Counter(),
            shape=shape,
            max_bytes=max_channels * 2000,
            worker_id="d",
        )

    def now_s(self) -> float:
        return self.now

    def _open(self, address: str) -> Pipe:
        near, far = pipes()
        self.peers.append((address, far))
        return near

    async def known(self, address: str) -> None:
        """Wait until it is known whether the channel opens."""
        done = asyncio.Event()
        self.pairs.when_known(address, done.set)
        async with asyncio.timeout(WAIT_S):
            await done.wait()


async def test_after_a_refusal_a_peer_is_asked_again_only_after_a_while():
    calls = Calls()
    assert calls.pairs.get("p:1") is None
    await asyncio.sleep(0)
    await calls.peers[0][1].send(pb.PairMessage(refused=pb.PairRefused(reason="not here")).SerializeToString())
    await calls.known("p:1")
    assert (calls.pairs.why_none("p:1"), calls.pairs.num_channels) == ("not here", 0)
    for after_s, asked in ((0.0, 1), (RETRY_S - 1.0, 1), (1.0, 2)):
        calls.now += after_s
        assert calls.pairs.get("p:1") is None
        await asyncio.sleep(0)
        assert len(calls.peers) == asked
    await calls.pairs.close()


async def test_a_silent_peer_is_given_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(made_pairs, "HELLO_S", 0.01)
    calls = Calls()
    calls.pairs.get("p:1")
    await calls.known("p:1")
    assert (calls.pairs.why_none("p:1"), calls.pairs.num_channels) == ("the peer does not answer", 0)
    assert calls.peers[0][1].is_cut


async def test_there_are_no_more_channels_than_memory_for_them():
    calls = Calls(max_channels=2)
    for number in range(3):
        calls.pairs.get(f"p:{number}")
    await asyncio.sleep(0)
    assert [address for address, _ in calls.peers] == ["p:0", "p:1"]
    assert calls.pairs.why_none("p:2") == TOO_MANY
    await calls.pairs.close()
