"""Addresses of a name, looked up again and again: what is told, and what stays."""

import asyncio
import socket
from typing import Any

import pytest

from twostroke.cluster.discovery.names import Names


def answer(*hosts: str) -> list[tuple[Any, ...]]:
    return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, 8002)) for host in hosts]


async def test_a_set_is_told_once_and_stays_while_its_name_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Any] = [
        answer("10.0.0.1"),
        answer("10.0.0.1"),
        OSError("no such name"),
        answer("10.0.0.2", "10.0.0.1"),
    ]
    known: list[frozenset[str]] = []
    names = Names("routers:8002", interval_s=0.0)

    def look_up(host: str, port: int, **_: Any) -> list[tuple[Any, ...]]:
        assert (host, port) == ("routers", 8002)
        known.append(names.addresses)
        found = answers.pop(0) if answers else answer("10.0.0.3")
        if isinstance(found, OSError):
            raise found
        return found

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    following, told = names.follow(), []
    async with asyncio.timeout(60.0):
        for _ in range(3):
            told.append(await anext(following))
    await following.aclose()
    first = frozenset({"10.0.0.1:8002"})
    both = frozenset({"10.0.0.1:8002", "10.0.0.2:8002"})
    assert told == [first, both, {"10.0.0.3:8002"}]
    assert known == [frozenset(), first, first, first, both]
