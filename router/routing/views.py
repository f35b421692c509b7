"""Conversions between fleet and policy: views of workers for a choice, and the counted work of a choice. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from ...core.errors import ContextLengthExceeded, InvalidRequest, ModelNotFound, Unavailable
from ...core.request import Request, Role, SequenceKey
from ...kv.keys import identity_class
from .candidates import RequestFacts, RoutingDecision, WorkerView
from .coefficients import coefficients_of, guess, pairs_of
from .facts import ModelFacts
from .fleet import Fleet
from .known_worker import Dispatched, Worker

RETRY_AFTER_S = 1.0


def model_of(fleet: Fleet, request: Request) -> ModelFacts:
    """The model of a request.

    Raises:
        Unavailable: no worker is known.
        ModelNotFound, InvalidRequest, ContextLengthExceeded: no worker could ever serve the request.
    """
    models = fleet.models()
    if not models:
        raise Unavailable("no worker has announced itself yet", retry_after_s=RETRY_AFTER_S)
    model = models.get(request.worker_model)
    if model is None or (request.adapter and not fleet.knows(request.adapter)):
        raise ModelNotFound(f"no worker serves {request.model!r}; known: {', '.join(sorted(models))}", param="model")
    needed = len(request.prompt_ids) + request.sampling.max_tokens
    decoding = [w for w in fleet if w.facts.model.name == model.name and w.role is not Role.PREFILL]
    room = max((w.facts.num_kv_tokens for w in decoding), default=needed)  # without a decode worker it waits for one
    bound = min(room, model.max_model_len or room)
    if not request.prompt_ids:
        raise InvalidRequest("the prompt has no tokens", param="prompt")
    if needed > bound:
        what = f"{len(request.prompt_ids)} prompt tokens and {request.sampling.max_tokens} asked for"
        raise ContextLengthExceeded(f"{what} make {needed}; at most {bound} fit", param="max_tokens")
    return model


def views_of(workers: Iterable[Worker]) -> list[WorkerView]:
    """Views of eligible workers, in the given order."""
    eligible = list(workers)
    otherwise = guess(worker.load for worker in eligible)
    return [
        WorkerView(
            key=worker.facts.key,
            address=worker.facts.address,
            role=worker.role,
            numerics=worker.facts.model.weights_fingerprint + identity_class(worker.facts.model),
            capabilities=worker.facts.capabilities,
            kv_spec=worker.facts.model.kv_spec,
            num_ranks=worker.facts.num_ranks,
            coefficients=coefficients_of(worker.load, otherwise),
            kv_bytes_per_token=worker.facts.model.kv_bytes_per_token,
            queued_prefill_tokens=worker.queued_prefill_tokens,
            queued_prefill_pairs=worker.queued_prefill_pairs,
            num_decoding=worker.num_decoding,
            max_num_seqs=worker.facts.max_num_seqs,
            free_kv_tokens=worker.free_kv_tokens,
            in_flight=len(worker.in_flight),
            slowdown=worker.slowdown,
        )
        for worker in eligible
    ]


def count_work(
    fleet: Fleet, request: RequestFacts, index: int, choice: RoutingDecision, now_s: float, *, is_leading: bool
) -> None:
    """Add one choice of a request to the chosen workers' counts, so that the next decision includes it.

    `is_leading`: it is the first one that is ordered.
    """
    key = SequenceKey(request.request_id, index)
    winner = choice.winner
    # The choices share the prompt: only the first one has prefill work.
    uncached = request.prompt_tokens - winner.prefill_held_tokens if is_leading else 1
    pairs = pairs_of(uncached, winner.prefill_held_tokens) if is_leading else 0.0
    context = request.prompt_tokens + request.expected_tokens
    is_local = winner.computes is winner.decode
    if is_leading:
        fleet.prompts.add(uncached)
    if is_local:
        fleet.dispatched(winner.decode.worker_id, key, Dispatched(now_s, uncached, context, pairs))
    else:
        fleet.dispatched(winner.decode.worker_id, key, Dispatched(now_s, 0, context))
        fleet.dispatched(winner.computes.worker_id, key, Dispatched(now_s, uncached, 0, pairs))
