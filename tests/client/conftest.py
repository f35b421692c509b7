"""A fresh protocol peer per test, on a real port."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# pytest's importlib mode puts no test folder on the path: peer.py is loaded once, under a name of its own.
_spec = importlib.util.spec_from_file_location("twostroke_test_client_peer", Path(__file__).with_name("peer.py"))
assert _spec is not None
assert _spec.loader is not None
peer_module = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = peer_module
_spec.loader.exec_module(peer_module)


@pytest.fixture
def peer() -> object:
    return peer_module.Peer()


@pytest.fixture
def address(peer: object) -> Iterator[str]:
    with peer_module.serving(peer) as port:
        yield f"127.0.0.1:{port}"
