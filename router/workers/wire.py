"""Conversion of protobuf messages to the router's facts, and of its orders to messages. Knows no stream, no state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import islice

from ...core.errors import InvalidRequest
from ...core.life import Transfer
from ...core.ports import check_address
from ...core.request import LOWEST_PRIORITY, Epoch, Request, SequenceKey
from ...core.tally import Spread
from ...core.timeline import Instant, Timeline
from ...kv.messages import (
    adopt_instants,
    epoch_to_wire,
    role_from_wire,
    sampling_to_wire,
    scope_to_wire,
    spec_from_wire,
)
from ...kv.spec import KvSpec
from ...protos import common_pb2, worker_pb2
from ..routing.candidates import Source, WorkerView
from ..routing.facts import AdapterFacts, GpuFacts, LoadFacts, ModelFacts, WorkerFacts

_LOAD_FIELDS = [name for name in LoadFacts.__dataclass_fields__ if name not in ("counters", "spreads", "gpus")]

_GPU_FIELDS = [name for name in GpuFacts.__dataclass_fields__ if name not in ("verdict", "reasons")]
MAX_ADAPTERS = 4096  # of one worker
MAX_CODEC_CHARS = 64
MAX_GPUS, MAX_REASONS, MAX_REASON_CHARS = 64, 16, 256


def worker_from_wire(info: common_pb2.WorkerInfo) -> WorkerFacts:
    """Facts of a worker's message about itself.

    Raises:
        InvalidRequest: a field that routing needs is absent, impossible, or unknown to this release.
    """
    for field in ("worker_id", "address", "incarnation", "num_kv_blocks", "block_tokens"):
        if not getattr(info, field):
            raise InvalidRequest(f"a worker announced itself without {field}", param=field)
    if not info.model.name or not info.model.weights_fingerprint:
        raise InvalidRequest("a worker announced itself without a model", param="model")
    return WorkerFacts(
        worker_id=info.worker_id,
        incarnation=info.incarnation,
        role=role_from_wire(info.role),
        address=check_address(info.address, "address"),
        model=_model_from(info.model),
        num_kv_blocks=info.num_kv_blocks,
        block_tokens=info.block_tokens,
        max_num_seqs=max(1, info.max_num_seqs),
        max_batch_tokens=info.max_batch_tokens,
        pid=info.pid,
        release=info.release,
        capabilities=tuple(info.capabilities),
        metrics_address=info.metrics_address,
        num_ranks=max(1, info.tensor_parallel_size),
        gpus=_gpus_from(info.gpus),
        adapters=tuple(
            AdapterFacts(found.name, found.digest, found.path, found.rank, found.size_bytes, found.asked)
            for found in islice(info.adapters, MAX_ADAPTERS)
            if found.name and found.digest
        ),
        changes_codec_to=info.changes_codec_to[:MAX_CODEC_CHARS],
    )


def _gpus_from(messages: Iterable[common_pb2.GpuState]) -> tuple[GpuFacts, ...]:
    """The first MAX_GPUS devices of a worker, each with its first MAX_REASONS reasons."""
    return tuple(
        GpuFacts(
            **{name: getattr(gpu, name) for name in _GPU_FIELDS},
            verdict=gpu.verdict or "ok",
            reasons=tuple(reason[:MAX_REASON_CHARS] for reason in gpu.reasons[:MAX_REASONS]),
        )
        for gpu in islice(messages, MAX_GPUS)
    )


def _model_from(model: common_pb2.ModelInfo) -> ModelFacts:
    spec = _spec_from(model.kv_spec.SerializeToString())
    return ModelFacts(
        name=model.name,
        weights_fingerprint=model.weights_fingerprint,
        numerics_class=model.numerics_class,
        numerics_description=model.numerics_description,
        max_model_len=model.max_model_len,
        vocab_size=model.vocab_size,
        deterministic=model.deterministic,
        path=model.path,
        kv_bytes_per_token=spec.bytes_per_token,
        kv_spec=spec,
        cache_codec=model.cache_codec[:MAX_CODEC_CHARS],
        fell_back_from=model.fell_back_from[:MAX_CODEC_CHARS],
    )


@lru_cache(maxsize=64)
def _spec_from(message: bytes) -> KvSpec:
    """Equal layouts become one object, so that comparing those of two workers is cheap."""
    return spec_from_wire(common_pb2.KvSpec.FromString(message))


def load_from_wire(report: worker_pb2.LoadReport) -> LoadFacts:
    """Facts of a worker's load report."""
    values = {name: getattr(report, name) for name in _LOAD_FIELDS}
    spreads = tuple((name, Spread(tuple(spread.counts), spread.total)) for name, spread in report.spreads.items())
    return LoadFacts(
        **values, counters=tuple(sorted(report.counters.items())), spreads=spreads, gpus=_gpus_from(report.gpus)
    )


def submit_to_wire(
    key: SequenceKey,
    request: Request,
    epoch: Epoch,
    peers: Sequence[WorkerView],
    left_s: float,
    *,
    emitted_ids: tuple[int, ...] = (),
    sources: Sequence[Source] = (),
    returns: Mapping[str, Sequence[Source]] | None = None,
) -> worker_pb2.Submit:
    """Order to run one choice of a request, after `emitted_ids`, which its client has; workers know it by `key`.

    `sources`: workers that hold blocks of the prompt with `emitted_ids`, best first; `returns`: those that the prefill
    peers fetch from, by the peer's name.
    Logprobs of the prompt are asked for with the first choice only, because all choices have the same prompt. They come
    with the first token.
    """
    has_scores = key.choice == 0 and not emitted_ids
    sampling = request.sampling if has_scores else replace(request.sampling, prompt_logprobs=None)
    return worker_pb2.Submit(
        request_id=key.request_id,
        choice=key.choice,
        epoch=epoch_to_wire(epoch),
        prompt_ids=request.prompt_ids + emitted_ids,
        emitted_tokens=len(emitted_ids),
        sampling=sampling_to_wire(sampling),
        **scope_to_wire(request.cache_scope),
        prefill_peers=[peer_to_wire(peer, (returns or {}).get(peer.worker_id, ())) for peer in peers],
        block_sources=_sources_to_wire(sources),
        timeout_ms=max(1, round(left_s * 1e3)),
        priority=LOWEST_PRIORITY - request.priority,  # on the wire a higher number goes first
    )


def peer_to_wire(peer: WorkerView, sources: Sequence[Source] = ()) -> worker_pb2.PrefillPeer:
    """A worker as orders name it to another one. `sources`: whom it fetches from before it computes."""
    return worker_pb2.PrefillPeer(
        worker_id=peer.worker_id,
        incarnation=peer.key.incarnation,
        address=peer.address,
        block_sources=_sources_to_wire(sources),
    )


def _sources_to_wire(sources: Sequence[Source]) -> list[worker_pb2.BlockSource]:
    return [
        worker_pb2.BlockSource(
            worker_id=s.view.worker_id,
            incarnation=s.view.key.incarnation,
            address=s.view.address,
            num_blocks=s.blocks,
        )
        for s in sources
    ]


def cancel_to_wire(name: str, epoch: Epoch, reason: str) -> worker_pb2.CancelRequest:
    """Order to cancel all choices of a request that were ordered under this epoch or an older one."""
    return worker_pb2.CancelRequest(request_id=name, epoch=epoch_to_wire(epoch), reason=reason)


def transfer_of(end: worker_pb2.RequestEnd) -> Transfer | None:
    """The complete hand-over in a request's end; None: there was none."""
    if not end.handover.prefill_worker or not end.handover.bytes_moved:
        return None
    timeline = Timeline()
    adopt_instants(timeline, end.timeline, 0.0)
    return Transfer(end.handover.bytes_moved, timeline.between_s(Instant.FIRST_FRAME, Instant.LAST_FRAME))
