"""A router's order as a checked value. Knows no stream, no engine."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.errors import InvalidRequest
from ..core.ports import check_address
from ..core.request import CacheScope, Epoch, SamplingParams, SequenceKey
from ..engine.facts import ModelFacts
from ..kv.handover.sources import BlockSource, sources_from_wire
from ..kv.messages import epoch_from_wire, sampling_from_wire, scope_from_wire
from ..kv.recent_prompts import NamedPrompt, RecentPrompts
from ..protos import worker_pb2


@dataclass(frozen=True, slots=True)
class Peer:
    """A prefill worker that may compute the prompt, or a worker that keeps a copy."""

    worker_id: str
    incarnation: int
    address: str
    sources: tuple[BlockSource, ...] = ()  # ranked; it fetches blocks from them before it computes the rest


@dataclass(frozen=True, slots=True)
class Order:
    """Order to generate one choice of one request, in one dispatch."""

    key: SequenceKey  # the router's name of it
    epoch: Epoch
    prompt: NamedPrompt
    params: SamplingParams
    scope: CacheScope
    peers: tuple[Peer, ...]  # ranked; empty: prefill locally
    timeout_s: float | None
    num_emitted: int  # trailing prompt ids that the client has received already
    priority: int
    serial: int  # of this worker's orders
    buddy: Peer | None = None  # it keeps a copy of the blocks as they fill
    sources: tuple[BlockSource, ...] = ()  # ranked; asked for blocks before anything is computed
    confirm: int = 0  # tokens until which it may kill its worker: its router is told who begins with it; 0: none

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """The prompt, with what earlier dispatches generated."""
        return self.prompt.prompt_ids

    @property
    def engine_key(self) -> SequenceKey:
        """Name inside this worker; unique, since two routers may use the same request name and epoch."""
        return SequenceKey(f"{self.key.request_id}/d{self.serial}", self.key.choice)


def key_of(message: worker_pb2.Submit) -> SequenceKey:
    """Request and choice of an order, also of one that `order_from_wire` refuses."""
    return SequenceKey(message.request_id, message.choice)


def order_from_wire(message: worker_pb2.Submit, model: ModelFacts, prompts: RecentPrompts, serial: int) -> Order:
    """Check an order against this worker's model. The router has validated the client's input; this guards the engine.

    Raises:
        InvalidRequest: no prompt, ids outside the vocabulary, impossible parameters, numbers or peers.
        ContextLengthExceeded: the prompt leaves no room for a token.
    """
    prompt_ids = tuple(message.prompt_ids)
    model.check_prompt(prompt_ids, message.emitted_tokens)
    if message.emitted_tokens >= len(prompt_ids):
        raise InvalidRequest(
            f"emitted_tokens is {message.emitted_tokens} of {len(prompt_ids)} prompt ids; must be fewer",
            param="emitted_tokens",
        )
    params = sampling_from_wire(message.sampling)
    model.check_sampling(params)
    scope = scope_from_wire(message)
    return Order(
        key=key_of(message),
        epoch=epoch_from_wire(message.epoch),
        prompt=prompts.name(message.request_id, prompt_ids, scope),
        params=params,
        scope=scope,
        peers=tuple(_peer(p) for p in message.prefill_peers),
        buddy=_peer(message.buddy) if message.HasField("buddy") else None,
        sources=sources_from_wire(message.block_sources),
        timeout_s=message.timeout_ms / 1000 if message.timeout_ms else None,
        num_emitted=message.emitted_tokens,
        priority=message.priority,
        serial=serial,
        confirm=message.confirm,
    )


def _peer(message: worker_pb2.PrefillPeer) -> Peer:
    address = check_address(message.address, "prefill_peers.address")
    return Peer(message.worker_id, message.incarnation, address, sources_from_wire(message.block_sources))
