"""Calls to a peer that does not prove the cluster's key: nothing of it is read, and none stays open."""

import asyncio
from typing import Any

import pytest

from twostroke.core import inside
from twostroke.core.inside import StreamCall, Unproven
from twostroke.core.proof import ANSWER_HEADER, Claim

CLAIM = Claim("/a.B/C", "10.0.0.7:8100", 1_700_000_000_000, b"n" * 16)


class Liar:
    """A call whose peer answers with these headers, or never with any, and has a message ready."""

    def __init__(self, metadata: Any) -> None:
        self.is_cancelled = False
        self._metadata = metadata

    async def initial_metadata(self) -> Any:
        if self._metadata is None:
            await asyncio.Event().wait()
        return self._metadata

    async def read(self) -> bytes:
        return b"trust me"

    def cancel(self) -> None:
        self.is_cancelled = True


async def test_a_peer_that_gave_a_wrong_proof_is_not_believed_at_the_second_read_either():
    call = StreamCall(Liar(((ANSWER_HEADER, b"w" * 32),)), CLAIM, b"k" * 32)
    for _ in range(2):
        with pytest.raises(Unproven, match="gave a wrong proof"):
            await call.read()


async def test_a_call_whose_peer_gives_no_proof_in_time_is_cancelled(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(inside, "ANSWER_S", 0.01)
    silent = Liar(None)
    with pytest.raises(Unproven, match=r"within 0\.01 s"):
        await StreamCall(silent, CLAIM, b"k" * 32).read()
    assert silent.is_cancelled
