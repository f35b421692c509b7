"""Room for messages that are read: every part comes back, whoever asks first is served first, nobody waits for ever."""

import asyncio
import time

import pytest

from twostroke.core.errors import DeadlineExceeded, Overloaded
from twostroke.router.api.http import reading
from twostroke.router.api.http.reading import Room, Workbench


async def test_a_lease_gives_back_what_it_did_not_need_and_then_the_rest_once():
    room = Room(100, one_tenant=True)
    lease = await room.take("a", 40)
    lease.shrink(10)
    assert room.free_bytes == 90
    lease.give_back()
    lease.give_back()
    assert room.free_bytes == 100


async def test_room_goes_to_who_waited_longest_and_past_a_tenant_that_has_its_half():
    room = Room(100, one_tenant=False)
    held = [await room.take("a", 25), await room.take("a", 25)]
    order: list[str] = []

    async def ask(tenant: str, size_bytes: int) -> None:
        lease = await room.take(tenant, size_bytes)
        order.append(tenant)
        lease.give_back()

    asking = [asyncio.create_task(ask(tenant, 50)) for tenant in ("a", "b", "c")]
    await asyncio.sleep(0)
    await asyncio.gather(*asking[1:])
    assert order == ["b", "c"]
    for lease in held:
        lease.give_back()
    await asking[0]
    assert order == ["b", "c", "a"]
    assert room.free_bytes == 100


@pytest.mark.parametrize("is_served_first", [True, False])
async def test_who_is_cancelled_while_waiting_keeps_nothing(is_served_first: bool):
    room = Room(10, one_tenant=True)
    held = await room.take("a", 10)
    waiting = asyncio.create_task(room.take("b", 10))
    await asyncio.sleep(0)
    if is_served_first:
        held.give_back()  # its turn comes, and it is cancelled before it runs
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    held.give_back()
    assert room.free_bytes == 10
    (await room.take("c", 10)).give_back()


async def test_short_messages_of_others_take_no_room_that_a_long_one_waits_for(monkeypatch: pytest.MonkeyPatch):
    room = Room(100, one_tenant=False)
    held = [await room.take(tenant, 20) for tenant in ("b", "c")]
    long = asyncio.create_task(room.take("a", 70))
    await asyncio.sleep(0)
    short = [asyncio.create_task(room.take(tenant, 20)) for tenant in ("b", "c", "d")]
    await asyncio.sleep(0)
    held[0].give_back()
    (await asyncio.wait_for(long, 60)).give_back()
    assert len([await asyncio.wait_for(one, 60) for one in short]) == 3

    room = Room(100, one_tenant=False)
    await room.take("b", 40)
    monkeypatch.setattr(reading, "WAIT_S", 0.05)
    long = asyncio.create_task(room.take("a", 70))
    await asyncio.sleep(0)
    monkeypatch.setattr(reading, "WAIT_S", 10.0)
    short = [asyncio.create_task(room.take("c", 20))]
    with pytest.raises(Overloaded):
        await long
    await asyncio.wait_for(short[0], 60)  # nothing keeps those behind one that gave up


async def test_waiting_is_bounded_in_time_and_in_number(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reading, "WAIT_S", 0.05)
    monkeypatch.setattr(reading, "MAX_WAITING", 1)
    room = Room(10, one_tenant=True)
    await room.take("a", 10)
    waiting = asyncio.create_task(room.take("b", 10))
    await asyncio.sleep(0)
    with pytest.raises(Overloaded, match="wait to be read"):
        await room.take("c", 10)
    with pytest.raises(Overloaded, match="no room"):
        await waiting


async def test_a_read_that_does_not_come_ends_sooner_where_others_wait(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reading, "CONTENDED_READ_S", 0.01)
    room = Room(10, one_tenant=True)
    lease = await room.take("a", 10)
    slow = asyncio.create_task(room.read(lease, lambda: asyncio.sleep(reading.READ_S)))
    await asyncio.sleep(0)
    waiting = asyncio.create_task(room.take("b", 10))
    with pytest.raises(DeadlineExceeded):
        await slow
    lease.give_back()
    await waiting


async def test_long_messages_are_worked_on_one_at_a_time_and_short_ones_at_once():
    bench = Workbench()
    num_running, most = 0, 0

    def work() -> None:
        nonlocal num_running, most
        num_running += 1
        most = max(most, num_running)
        time.sleep(0.001)  # others would run meanwhile
        num_running -= 1

    await asyncio.gather(*(bench.run(1 << 20, work) for _ in range(20)))
    assert most == 1
    assert await bench.run(10, asyncio.get_running_loop) is asyncio.get_running_loop()
    bench.close()
