"""An order as the engine and a prefill worker are told of it. Pure: knows no stream and no state of the run."""

from __future__ import annotations

from ..engine.facts import FaceFacts
from ..engine.link import messages as link
from ..kv.handover.pairing import CAPABILITIES
from ..kv.handover.sources import sources_to_wire
from ..kv.messages import sampling_to_wire, scope_to_wire, spec_to_wire
from ..kv.windows import windows_from
from ..protos import handover_pb2
from .order import Order, Peer
from .pull import Offer


def submit_of(order: Order, deadline_s: float, adapter_slot: int) -> link.Submit:
    """The sequence that an order makes in the engine. `deadline_s`: in this worker's clock."""
    names = order.prompt.names
    return link.Submit(
        key=order.engine_key,
        source=link.Source.PEER if order.peers or order.sources else link.Source.LOCAL,
        prompt_ids=order.prompt_ids,
        identities=names.identities,
        identity_root=names.root,
        params=order.params,
        num_emitted=order.num_emitted,
        priority=order.priority,
        deadline_s=deadline_s,
        adapter_slot=adapter_slot,
    )


def open_of(
    order: Order, peer: Peer, facts: FaceFacts, held_tokens: int, *, left_s: float, offer: Offer
) -> handover_pb2.Open:
    """The first message of a hand-over from `peer`.

    `held_tokens`: leading ones whose KV is here; `left_s`: until the deadline.
    """
    return handover_pb2.Open(
        prompt_ids=order.prompt_ids,
        held_tokens=held_tokens,
        sampling=sampling_to_wire(order.params),
        **scope_to_wire(order.scope),
        kv_spec=spec_to_wire(facts.model.kv_spec),
        numerics_class=facts.model.numerics_class,
        deterministic=facts.model.deterministic,
        frame_slots=facts.frame_slots,
        timeout_ms=max(1, round(left_s * 1000)),
        capabilities=CAPABILITIES,
        worker_id=facts.worker_id,
        priority=order.priority,
        emitted_tokens=order.num_emitted,
        identity_root=order.prompt.names.root,
        shared_memory=None if offer.ring is None else offer.ring.memory.offer(),
        pair=0 if offer.pair is None else offer.pair.number,
        pair_key=offer.pair_key,
        required_transport=facts.transport.required,
        tensor_parallel_size=facts.num_ranks,
        block_sources=sources_to_wire(peer.sources),
        windows_from=windows_from(facts.model.kv_spec.main.windowed, held_tokens, len(order.prompt_ids)),
    )
