"""Offers of a simulated worker to its streams' buddies: calls and timers of the journal, and checks of every offer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from google.protobuf.message import DecodeError

from ...core.request import SequenceKey
from ...decode_worker.journal import JournalLimits
from ...engine.sequence import Sequence
from ...protos import handover_pb2
from ..invariants import Violation
from ..world import Timer

if TYPE_CHECKING:
    from .node import WorkerNode


class SimBuddies:
    """Implements `Buddies` of decode_worker/journaling.py."""

    def __init__(self, node: WorkerNode, limits: JournalLimits) -> None:
        self._node = node
        self._limits = limits
        self._num_calls = 0  # under way
        self._began_s = node.world.now_s()
        self._spent_bytes = 0  # of all offers, at least
        self._kept: dict[SequenceKey, int] = {}  # most tokens of a run that a buddy says it has

    def keep(self, address: str, request: bytes, timeout_s: float, answered: Callable[[bytes | None], None]) -> None:
        """Implements `Buddies.keep`."""
        node, asked = self._node, handover_pb2.KeepRequest.FromString(request)
        self._num_calls += 1
        if self._num_calls > self._limits.max_under_way:
            raise Violation("Q1", f"{node.process} makes {self._num_calls} offers at once")
        runs = self._runs_of(asked)
        self._spend(runs, len(asked.token_ids))
        node.world.note(node.process, f"offers {len(asked.token_ids)} tokens to {address}")
        near, far = node.connect(address, f"offer>{address}")
        peer = node.peer_at(address)
        if peer.process.is_alive:
            far.on_message = lambda message: peer.blocks.accept_keep(far, message)

        def over(reply: bytes | None) -> None:
            timer.cancel()
            near.on_message, near.on_end = lambda _: None, lambda: None
            near.abort()
            self._num_calls -= 1
            if _is_whole(reply, asked):
                self._kept |= {run.key: len(asked.token_ids) for run in runs}
            answered(reply)

        timer = self.after(timeout_s, lambda: over(None))
        near.on_message, near.on_end = lambda message: over(message[0]), lambda: over(None)
        near.send(asked)

    def after(self, delay_s: float, act: Callable[[], None]) -> Timer:
        """Implements `Buddies.after`."""
        return self._node.world.after(delay_s, self._node.process, act)

    def close(self) -> None:
        """Implements `Buddies.close`. A simulated process that ends takes its calls with it."""

    def _runs_of(self, asked: handover_pb2.KeepRequest) -> list[Sequence]:
        """The live sequences whose blocks may be meant. Check K7: such a one has computed all that is offered."""
        engine, num_tokens = self._node.engine, len(asked.token_ids)
        offered = list(asked.token_ids)
        known = [key for key, known in engine.store.known.items() if known.tokens[:num_tokens] == offered]
        live = engine.core._scheduler.by_key
        runs = [live[key] for key in known if key in live]
        has_ended = len(runs) < len(known)  # the face has not heard of it yet
        if not has_ended and not any(run.num_computed >= num_tokens or run.preemptions for run in runs):
            raise Violation("K7", f"{self._node.process} offers {num_tokens} tokens that are not computed here")
        return runs

    def _spend(self, runs: list[Sequence], num_tokens: int) -> None:
        """Check Q1: no offer begins while earlier ones have used up the bytes that there were until now."""
        passed_s = self._node.world.now_s() - self._began_s
        if self._spent_bytes > self._limits.bytes_per_s * (1 + passed_s):
            raise Violation("Q1", f"{self._node.process} has offered {self._spent_bytes} bytes in {passed_s:.2f} s")
        held = max((max(run.num_prompt, self._kept.get(run.key, 0)) for run in runs), default=num_tokens)
        self._spent_bytes += max(0, num_tokens - held) * self._node.spec.bytes_per_token


def _is_whole(reply: bytes | None, asked: handover_pb2.KeepRequest) -> bool:
    try:
        return reply is not None and handover_pb2.KeepReply.FromString(reply).kept_tokens == len(asked.token_ids)
    except DecodeError:
        return False
