"""A fresh protocol peer per test, on a real port."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.fakes import peer as peer_module


@pytest.fixture
def peer() -> object:
    return peer_module.Peer()


@pytest.fixture
def address(peer: object) -> Iterator[str]:
    with peer_module.serving(peer) as port:
        yield f"127.0.0.1:{port}"
