"""Which paired channels a prefill worker accepts from decode workers, and which it has. Pure."""

from __future__ import annotations

from collections import Counter
from typing import Generic, TypeVar

from ..kv.handover.paired_transfers import MAX_SLOT_BYTES, MAX_SLOTS
from ..kv.handover.plane_channel import GLOO, SendingEnd, TransportPolicy
from ..protos import handover_pb2 as pb

E = TypeVar("E", bound=SendingEnd)


class AcceptedChannels(Generic[E]):
    """All channels of one worker, by the number of their hello."""

    def __init__(
        self, policy: TransportPolicy, max_bytes: int, counters: Counter[str], *, has_certificates: bool
    ) -> None:
        """`max_bytes` bounds the memory of all channels together.

        `has_certificates`: calls inside the cluster are encrypted, and a paired channel would not be.
        """
        self._has_certificates = has_certificates
        self._policy = policy
        self._max_bytes = max_bytes
        self._counters = counters
        self._sizes: dict[int, int] = {}  # of these, and of channels that are being accepted
        self._ends: dict[int, E] = {}

    @property
    def num_channels(self) -> int:
        """Channels that are open, being made, or over while the library can still reach their memory."""
        return len(self._ends)

    @property
    def num_open(self) -> int:
        """Channels that carry planes now."""
        return sum(end.is_open for end in self._ends.values())

    @property
    def held_bytes(self) -> int:
        """Memory of all channels together."""
        return sum(self._sizes.values())

    def get(self, number: int) -> SendingEnd | None:
        """The open channel of a number; None: it is not known, not open yet, or over."""
        end = self._ends.get(number)
        return end if end is not None and end.is_open else None

    def answer(self, hello: pb.PairHello) -> pb.PairMessage:
        """The answer to a hello. Number and memory of one that is accepted are taken; `began` and `over` follow.

        Other hellos come before the answer is sent and the channel begins.
        """
        why = self._refusal(hello)
        if why:
            return pb.PairMessage(refused=pb.PairRefused(reason=why))
        self._sizes[hello.number] = hello.slots * hello.slot_bytes
        return pb.PairMessage(accepted=pb.PairAccepted())

    def began(self, hello: pb.PairHello, end: E) -> None:
        """This is our end of an accepted channel."""
        self._ends[hello.number] = end

    def over(self, hello: pb.PairHello) -> None:
        """The channel is over, and the library cannot reach its memory any more; or its answer could not be sent."""
        del self._sizes[hello.number]
        if self._ends.pop(hello.number, None) is not None:
            self._counters["paired_channels_ended"] += 1

    def _refusal(self, hello: pb.PairHello) -> str:
        """Why a channel is refused; empty if it is not."""
        if not self._policy.may_pair:
            return f"this prefill worker's cache.transport is {self._policy.wanted}"
        if self._has_certificates and self._policy.wanted != GLOO:
            return (
                "a paired channel is not encrypted, and this cluster is: give the prefill worker cache.transport gloo"
            )
        if hello.backend != GLOO:
            return f"backend {hello.backend!r} is not known; gloo is"
        if not 0 < hello.slots <= MAX_SLOTS or not 0 < hello.slot_bytes <= MAX_SLOT_BYTES:
            return f"{hello.slots} slots of {hello.slot_bytes} bytes; at most {MAX_SLOTS} of {MAX_SLOT_BYTES}"
        if not hello.number or hello.number in self._sizes:
            return f"channel {hello.number} is there already"
        if self.held_bytes + hello.slots * hello.slot_bytes > self._max_bytes:
            return f"no memory for another paired channel; cache.ring_bytes is {self._max_bytes}"
        return ""
