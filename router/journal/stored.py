"""What a store holds of a request, read back: a request and the first of its pieces. Pure.

A batch that is missing, damaged or strange ends the reading: what was read before it is a prefix of the stream, and a
prefix is all that is needed to compute the rest.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from google.protobuf.message import DecodeError

from ...core.errors import TwostrokeError
from ...kv.messages import error_from_wire
from ...protos import peers_pb2
from ..requests.delivery import Delivery
from ..requests.pieces import OutputDelta
from .journal import Asked, Entry
from .wire import asked_from_wire, items, piece_from_wire


@dataclass(slots=True)
class Stored:
    """A request as it was stored."""

    asked: Asked
    pieces: list[OutputDelta] = field(default_factory=list)
    error: TwostrokeError | None = None
    is_over: bool = False


def batch_of(entry: Entry, first: int) -> peers_pb2.JournalBatch:
    """All items of an entry from number `first` on: 0 is the request, then its pieces, at last its end."""
    found = list(items(entry.asked, entry.pieces[max(0, first - 1) :], entry.error))
    if first > 0:
        del found[0]
    if entry.is_over and entry.error is None:
        found.append(peers_pb2.JournalItem(over=True))
    return peers_pb2.JournalBatch(first=first, items=found)


def read_back(batches: Iterable[bytes], tenant: str, request_id: str) -> Stored | None:
    """The request of this tenant and id, with the pieces that follow each other; None: it is not there."""
    stored: Stored | None = None
    delivery: Delivery | None = None
    expected = 0
    for raw in batches:
        try:
            batch = peers_pb2.JournalBatch.FromString(raw)
        except DecodeError:
            break
        if batch.first > expected:
            break
        for item in batch.items[expected - batch.first :]:
            expected += 1
            if stored is None:
                stored = _request(item, tenant, request_id)
                if stored is None:
                    return None
                delivery = Delivery(stored.asked.request.num_choices)
            elif delivery is None or stored.is_over or not _take(item, stored, delivery):
                return stored
    return stored


def _request(item: peers_pb2.JournalItem, tenant: str, request_id: str) -> Stored | None:
    if not item.HasField("request"):
        return None
    try:
        asked = asked_from_wire(item.request)
    except TwostrokeError:
        return None
    return Stored(asked) if asked.name == (tenant, request_id) else None


def _take(item: peers_pb2.JournalItem, stored: Stored, delivery: Delivery) -> bool:
    match item.WhichOneof("body"):
        case "piece":
            piece = piece_from_wire(item.piece)
            is_next = delivery.restore(piece.choice, piece.first_index, piece.token_ids, piece.finish_reason)
            if is_next:
                stored.pieces.append(piece)
            return is_next
        case "error":
            stored.error, stored.is_over = error_from_wire(item.error), True
            return True
        case "over":
            stored.is_over = not delivery.unfinished
            return True
    return False
