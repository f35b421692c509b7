"""Which paired channels a prefill worker accepts: by policy, number and memory, also of hellos at the same time."""

import asyncio
from collections import Counter

import pytest
from support.engines.scripted_pair import Pipe, Wire, pipes

from twostroke.kv.handover.paired_library import Patience
from twostroke.kv.handover.paired_transfers import MAX_SLOT_BYTES, MAX_SLOTS
from twostroke.kv.handover.plane_channel import TransportPolicy
from twostroke.kv.handover.transports.paired_end import PairedSource, PairSettings
from twostroke.prefill_worker.pairs import PairService
from twostroke.protos import handover_pb2 as pb

SLOTS, SLOT_BYTES, WAIT_S = 2, 1000, 20.0


class SlowPipe(Pipe):
    """What is sent into it waits until the peer reads."""

    def __init__(self) -> None:
        super().__init__()
        self.may_send = asyncio.Event()
        self.is_sending = asyncio.Event()

    async def send(self, envelope: bytes) -> None:
        self.is_sending.set()
        await self.may_send.wait()
        await super().send(envelope)


class Accepting:
    """A service, and callers of it."""

    def __init__(self, policy: TransportPolicy | None = None, *, max_bytes: int = 1 << 20, certificates=False) -> None:
        self.counters: Counter[str] = Counter()
        settings = PairSettings("", Patience(WAIT_S, WAIT_S), lambda backend, store, host: Wire().join)
        self.service = PairService(
            lambda slots, slot_bytes: PairedSource(slots, slot_bytes, settings),
            policy or TransportPolicy(),
            max_bytes,
            self.counters,
            has_certificates=certificates,
        )
        self.tasks: list[asyncio.Task[None]] = []

    def call(self, near: Pipe, far: Pipe, number: int = 7, **changes) -> None:
        """Say hello, and have the service hear it."""
        fields = {"number": number, "backend": "gloo", "slots": SLOTS, "slot_bytes": SLOT_BYTES, **changes}
        hello = pb.PairMessage(hello=pb.PairHello(**fields))
        far.inbox.put_nowait(hello.SerializeToString())
        near.peer, far.peer = far, near
        self.tasks.append(asyncio.create_task(self.service.serve(far)))

    async def answer(self, near: Pipe) -> str:
        """The reason of a refusal; empty: it was accepted."""
        async with asyncio.timeout(WAIT_S):
            raw = await near.receive()
        assert raw is not None
        message = pb.PairMessage.FromString(raw)
        assert message.WhichOneof("body") in ("accepted", "refused")
        return message.refused.reason

    async def asked(self, number: int = 7, **changes) -> tuple[Pipe, str]:
        near, far = pipes()
        self.call(near, far, number, **changes)
        return near, await self.answer(near)

    async def over(self) -> None:
        async with asyncio.timeout(WAIT_S):
            await asyncio.gather(*self.tasks)


async def test_channels_have_numbers_of_their_own_and_share_the_memory_until_they_end():
    it = Accepting(max_bytes=2 * SLOTS * SLOT_BYTES)
    first, why = await it.asked(7)
    assert why == ""
    assert it.service.num_channels == 1
    assert (await it.asked(7))[1] == "channel 7 is there already"
    second, why = await it.asked(8)
    assert why == ""
    assert "no memory for another paired channel" in (await it.asked(9))[1]
    for pipe in (first, second):
        pipe.close()
    await it.over()
    assert (it.service.num_channels, it.counters["paired_channels_ended"]) == (0, 2)
    third, why = await it.asked(7, slots=2 * SLOTS)
    assert why == "", "number and memory are free again"
    third.close()
    await it.over()


async def test_hellos_at_the_same_time_get_no_more_memory_than_there_is_nor_one_number_twice():
    it = Accepting(max_bytes=SLOTS * SLOT_BYTES)
    near, far = Pipe(), SlowPipe()
    it.call(near, far, 7)
    await far.is_sending.wait()  # the first is accepted, and its answer is under way
    assert (await it.asked(7))[1] == "channel 7 is there already"
    assert "no memory for another paired channel" in (await it.asked(8))[1]
    far.may_send.set()
    assert await it.answer(near) == ""
    near.close()
    await it.over()
    last, why = await it.asked(8)
    assert why == ""
    last.close()
    await it.over()


async def test_a_caller_that_goes_before_its_answer_holds_nothing():
    it = Accepting(max_bytes=SLOTS * SLOT_BYTES)
    near, far = Pipe(), SlowPipe()
    it.call(near, far, 7)
    await far.is_sending.wait()
    near.close()
    far.may_send.set()
    await it.over()
    assert it.counters["paired_channels_ended"] == 0, "there was none"
    last, why = await it.asked(7)
    assert why == ""
    last.close()
    await it.over()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"backend": "nccl"}, "backend 'nccl' is not known"),
        ({"slots": 0}, "0 slots of 1000 bytes"),
        ({"slots": MAX_SLOTS + 1}, "257 slots of 1000 bytes"),
        ({"slot_bytes": 0}, "2 slots of 0 bytes"),
        ({"slot_bytes": MAX_SLOT_BYTES + 1}, "at most 256 of 67108864"),
        ({"number": 0}, "channel 0 is there already"),
    ],
)
async def test_what_cannot_be_made_is_refused_with_the_reason(changes, why):
    it = Accepting(max_bytes=1 << 40)
    assert why in (await it.asked(**changes))[1]
    await it.over()
    assert it.service.num_channels == 0


async def test_policy_and_certificates_decide_about_channels_in_the_clear():
    assert "cache.transport is grpc" in (await Accepting(TransportPolicy("grpc")).asked())[1]
    assert "not encrypted" in (await Accepting(TransportPolicy("auto"), certificates=True).asked())[1]
    it = Accepting(TransportPolicy("gloo"), certificates=True)
    near, why = await it.asked()
    assert why == "", "somebody has asked for it"
    near.close()
    await it.over()
