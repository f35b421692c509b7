"""Channels to workers: those of workers that are gone are not kept."""

from __future__ import annotations

import asyncio

import grpc
import grpc.aio
import pytest

from twostroke.kv.handover.transports import grpc as transport

DEAD = "127.0.0.1:1"


async def test_many_that_are_not_connected_are_closed_and_the_connected_one_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(transport, "MAX_CHANNELS", 4)
    server = grpc.aio.server()
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    channels = transport.Channels(b"k" * 32)
    live = channels.to(address)
    async with asyncio.timeout(60):
        while (state := live.get_state(True)) is not grpc.ChannelConnectivity.READY:
            await live.wait_for_state_change(state)
    for number in range(20):
        channels.to(f"{DEAD}{number}")
    assert len(channels._channel_by_address) == 21, "a call may be about to begin on each of them"
    monkeypatch.setattr(transport, "UNUSED_S", 0.0)
    for number in range(20, 30):
        channels.to(f"{DEAD}{number}")
        assert len(channels._channel_by_address) <= 4
    assert channels.to(address) is live
    await channels.close()
    assert not channels._closing
    await server.stop(None)
