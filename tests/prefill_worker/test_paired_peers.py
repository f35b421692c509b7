"""Which paired channels a prefill worker accepts, and whose memory it counts."""

from collections import Counter
from types import SimpleNamespace

import pytest

from twostroke.kv.handover.paired_transfers import MAX_SLOT_BYTES, MAX_SLOTS
from twostroke.kv.handover.plane_channel import TransportPolicy
from twostroke.prefill_worker.paired_peers import AcceptedChannels
from twostroke.protos import handover_pb2 as pb


def hello(number: int = 1, slots: int = 2, slot_bytes: int = 100, backend: str = "gloo") -> pb.PairHello:
    return pb.PairHello(number=number, backend=backend, slots=slots, slot_bytes=slot_bytes)


def channels(wanted: str = "auto", max_bytes: int = 500, *, has_certificates: bool = False):
    return AcceptedChannels(TransportPolicy(wanted), max_bytes, Counter(), has_certificates=has_certificates)


def test_an_open_channel_is_found_until_it_is_over():
    held, end = channels(), SimpleNamespace(is_open=False)
    assert held.answer(hello()).HasField("accepted")
    held.began(hello(), end)
    assert held.get(1) is None, "not open yet"
    end.is_open = True
    assert held.get(1) is end
    assert held.get(2) is None
    assert (held.num_channels, held.num_open, held.held_bytes) == (1, 1, 200)
    held.over(hello())
    assert held.get(1) is None
    assert (held.num_channels, held.num_open, held.held_bytes) == (0, 0, 0)


def test_memory_is_counted_until_a_channel_is_over():
    held = channels()
    for number in (1, 2):
        assert held.answer(hello(number)).HasField("accepted")
        held.began(hello(number), SimpleNamespace(is_open=False))
    assert "no memory" in held.answer(hello(3)).refused.reason
    held.over(hello(1))
    assert held.answer(hello(3)).HasField("accepted")


@pytest.mark.parametrize(
    ("held", "asked", "why"),
    [
        (channels("shm"), hello(), "cache.transport is shm"),
        (channels(has_certificates=True), hello(), "not encrypted"),
        (channels(), hello(backend="nccl"), "backend 'nccl' is not known"),
        (channels(), hello(number=0), "channel 0 is there already"),
        (channels(), hello(slots=0), "0 slots"),
        (channels(max_bytes=1 << 60), hello(slots=MAX_SLOTS + 1), f"{MAX_SLOTS + 1} slots"),
        (channels(max_bytes=1 << 60), hello(slot_bytes=MAX_SLOT_BYTES + 1), f"{MAX_SLOT_BYTES + 1} bytes"),
        (channels(), hello(slots=6), "no memory"),
    ],
)
def test_what_is_refused_says_why(held, asked, why):
    assert why in held.answer(asked).refused.reason


def test_a_cluster_with_certificates_takes_a_channel_that_the_settings_ask_for():
    assert channels("gloo", has_certificates=True).answer(hello()).HasField("accepted")
