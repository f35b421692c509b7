"""The wait of a drain: for the end of what runs, a deadline, or its undoing."""

import asyncio

from twostroke.engine.link.draining import Draining


async def test_it_ends_when_nothing_runs_and_at_its_deadline():
    draining, idle = Draining(), asyncio.Event()
    async with asyncio.timeout(60.0):
        assert await draining.until(idle, 0.01)
    idle.set()
    async with asyncio.timeout(60.0):
        assert await draining.until(idle, 3600.0)
    assert draining.is_on


async def test_an_undone_drain_ends_nothing_also_if_another_one_began_meanwhile():
    draining, idle = Draining(), asyncio.Event()
    first = asyncio.create_task(draining.until(idle, 60.0))
    await asyncio.sleep(0)
    assert draining.is_on
    draining.undo()
    assert not draining.is_on
    second = asyncio.create_task(draining.until(idle, 60.0))
    async with asyncio.timeout(60):
        assert not await first
    assert draining.is_on
    idle.set()
    assert await second
