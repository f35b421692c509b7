"""Reports about requests and workers as JSON-able values. Reads state, changes none."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ...core.request import SamplingParams
from ...core.sampling import FIELD_BY_NAME, Form, SamplingField
from ...core.timeline import Instant, Timeline
from ..routing.candidates import Candidate, RoutingDecision
from ..routing.coefficients import FIELDS, Coefficients
from ..routing.cordoned import Cordoned
from ..routing.facts import GpuFacts
from ..routing.known_worker import Worker
from ..routing.recorded import asked_to_json
from .attempts import Dispatch
from .state import RequestState

MAX_SHOWN = 32  # entries of a list; a longer one is replaced by its length
MAX_TEXT = 64  # characters of a text in a list
MAX_MESSAGE = 1000  # characters of an error


def explain_run(run: RequestState, state: str) -> dict[str, Any]:
    """Report of one request: parameters, decisions with reasons, outcome. Times in milliseconds since its arrival."""
    handover = dict(run.handovers).get(0) or (run.handovers[0][1] if run.handovers else None)
    reports = [report for _, report in run.handovers]
    current = run.current
    usage = run.usage
    return {
        "request_id": run.request_id,
        "name": run.name,
        "tenant": run.request.owner,
        "isolation_domain": run.request.isolation_domain,
        "model": run.request.model,
        "adapter": run.request.adapter.hex() or None,
        "state": state,
        "num_choices": run.request.num_choices,
        "sampling": explain_sampling(run.request.sampling),
        "ignored_fields": _shown(run.request.ignored_fields, "names"),
        "timeout_s": run.request.timeout_s,
        "tokens": {
            "prompt": usage.prompt_tokens,
            "cached": usage.cached_tokens,
            "completion": usage.completion_tokens,
        },
        "speculation": {
            "proposers": sorted(run.proposers),
            "draft_tokens": usage.draft_tokens,
            "accepted_tokens": usage.accepted_tokens,
        },
        "prefill_worker": _prefill_worker(run, handover),
        "decode_worker": current.decode.worker_id if current else None,
        "kv_bytes_moved": sum(report["bytes_moved"] for report in reports),
        "kv_bytes_as_bf16": sum(report["bytes_as_bf16"] for report in reports),
        "handover": handover,
        "ttft_ms": _between_ms(run, Instant.ARRIVED, Instant.FIRST_SENT),
        "itl_ms": _pace(run),
        "finish_reasons": [reason.value if reason else None for reason in run.delivery.finish_reasons],
        "error": {"code": run.error.code, "message": _cut(run.error.message, MAX_MESSAGE)} if run.error else None,
        "timeline": timeline_ms(run),
        "choice": _made(explain_choice(current.choice), handover) if current else None,
        "dispatches": [_dispatch(run, dispatch) for dispatch in run.dispatches],
    }


def _made(choice: dict[str, Any], handover: dict[str, Any] | None) -> dict[str, Any]:
    """A choice whose reason also says where the decode worker departed from it, as its report tells."""
    why = handover["local_reason"] if handover is not None else ""
    if why and choice["winner"]["computed_by"] != choice["winner"]["decode_worker"]:
        worker = choice["winner"]["decode_worker"]
        choice["reason"] += f"; {worker} computed the prompt itself after all: {why}"
    return choice


def _dispatch(run: RequestState, dispatch: Dispatch) -> dict[str, Any]:
    """One attempt: where it went, after how many tokens, what its workers told of it, and why it was given up."""
    left, first_s = dispatch.left, dispatch.first_token_s
    return {
        "epoch": list(dispatch.epoch),
        "at_ms": _ms(dispatch.at_s - run.arrived_s),
        "decode_worker": dispatch.decode.worker_id,
        "prefill_peers": [peer.worker_id for peer in dispatch.choice.prefill_peers],
        "block_sources": [source.view.worker_id for source in dispatch.choice.winner.sources],
        "return_sources": [source.view.worker_id for source in dispatch.choice.winner.returns],
        "fetched": dispatch.fetched,
        "buddy": None if dispatch.choice.buddy is None else dispatch.choice.buddy.worker_id,
        "resumed_tokens": list(dispatch.resumed),
        "first_token_ms": None if first_s is None else _ms(first_s - run.arrived_s),
        "timeline": _instants_ms(run, dispatch.timeline),
        "left": None
        if left is None
        else {
            "at_ms": _ms(left.at_s - run.arrived_s),
            "code": left.error.code,
            "message": _cut(left.error.message, MAX_MESSAGE),
        },
    }


def explain_sampling(sampling: SamplingParams) -> dict[str, Any]:
    """Sampling parameters; a long list is shown as its length."""
    return {name: _of_field(FIELD_BY_NAME[name], getattr(sampling, name)) for name in sampling.__slots__}


def _of_field(field: SamplingField, value: Any) -> Any:
    if field.form is Form.WORDS and sum(map(len, value)) > MAX_SHOWN:
        return f"{len(value)} {field.form.value}"
    if field.form is Form.GRAMMAR and value is not None:
        return {value.kind: _cut(value.source, MAX_TEXT)}
    return _shown(value, field.form.value) if field.max_entries else value


def _shown(values: Sequence[Any], what: str) -> list[Any] | str:
    """A list with its texts shortened; a list that is too long is replaced by its length."""
    if len(values) > MAX_SHOWN:
        return f"{len(values)} {what}"
    return [_cut(value, MAX_TEXT) if isinstance(value, str) else value for value in values]


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[:most] + "..."


def timeline_ms(run: RequestState) -> dict[str, float]:
    """All recorded instants, in order, in milliseconds since the request's arrival."""
    return _instants_ms(run, run.timeline)


def _instants_ms(run: RequestState, timeline: Timeline) -> dict[str, float]:
    found = [(at_s, instant.value) for instant in Instant if (at_s := timeline.at_s(instant)) is not None]
    return {name: _ms(at_s - run.arrived_s) for at_s, name in sorted(found, key=lambda pair: pair[0])}


def explain_choice(choice: RoutingDecision) -> dict[str, Any]:
    """A routing decision with all candidates."""
    return {
        "reason": choice.reason,
        "winner": _candidate(choice.winner),
        "prefill_peers": [peer.worker_id for peer in choice.prefill_peers],
        "candidates": [_candidate(candidate) for candidate in choice.candidates],
        "refused_pairs": [
            {"prefill_worker": p.prefill, "decode_worker": p.decode, "field": p.field, "reason": p.reason}
            for p in choice.refused
        ],
    }


def explain_decisions(run: RequestState) -> list[dict[str, Any]]:
    """Every attempt's decision with all that it was made from, for the decision log."""
    return [
        {
            "epoch": list(dispatch.epoch),
            "asked": asked_to_json(dispatch.choice.asked),
            "choice": explain_choice(dispatch.choice),
        }
        for dispatch in run.dispatches
        if dispatch.choice.asked is not None
    ]


def explain_worker(worker: Worker, coefficients: Coefficients, now_s: float) -> dict[str, Any]:
    """Report of one worker, for `status`."""
    facts, load = worker.facts, worker.load
    return {
        "worker_id": facts.worker_id,
        "incarnation": str(facts.incarnation),  # as text: JavaScript rounds JSON numbers of 64 bits
        "role": worker.role.value,
        "state": worker.state.value,
        "address": facts.address,
        "metrics_address": facts.metrics_address or None,
        "pid": facts.pid,
        "release": facts.release,
        "model": facts.model.name,
        "numerics": facts.model.numerics_description,
        "cache_codec": facts.model.cache_codec,
        "fell_back_from": facts.model.fell_back_from or None,  # codec that its guard found too coarse
        "changes_codec_to": facts.changes_codec_to or None,  # while it drains for that
        "tensor_parallel_size": facts.num_ranks,
        "session": "up" if worker.session_up else "down",
        "phase": worker.phase,
        "steps": worker.steps,
        "heard_ms_ago": _ms(now_s - worker.heard_s),
        "in_flight": len(worker.in_flight),
        "max_num_seqs": facts.max_num_seqs,
        "load": {
            "waiting": load.waiting,
            "running": load.running,
            "queued_prefill_tokens": load.queued_prefill_tokens,
            "running_context_tokens": load.running_context_tokens,
        },
        "blocks": {
            "block_tokens": facts.block_tokens,
            "total": load.total_blocks or facts.num_kv_blocks,
            "free": load.free_blocks,
            "cached": load.cached_blocks,
            "promised": load.promised_blocks,
        },
        "coefficients": {name: getattr(coefficients, name) for name in FIELDS},  # that routing uses
        "measured": {name: getattr(load, name) for name in FIELDS},  # by the worker itself; 0: not yet
        "counters": dict(load.counters),
        "gpus": [explain_gpu(gpu) for gpu in worker.gpus],
        "adapters": [{**asdict(adapter), "digest": adapter.digest.hex()} for adapter in facts.adapters],
    }


def explain_gpu(gpu: GpuFacts) -> dict[str, Any]:
    """Report of one GPU of a worker, for `status`."""
    return {**asdict(gpu), "reasons": list(gpu.reasons)}


def explain_cordoned(cordoned: Cordoned, now_s: float) -> dict[str, Any]:
    """Report of a GPU that no worker may use any more."""
    return {
        "uuid": cordoned.gpu.uuid,
        "name": cordoned.gpu.name,
        "worker_id": cordoned.worker_id,
        "reasons": list(cordoned.gpu.reasons),
        "since_s": round(now_s - cordoned.at_s, 3),
    }


def _candidate(candidate: Candidate) -> dict[str, Any]:
    """One way to serve the request. Its terms have the names of `Terms`, and `total_ms` is their sum."""
    terms = {name: round(value, 3) for name, value in asdict(candidate.terms).items()}
    return {
        "prefill_worker": candidate.prefill.worker_id if candidate.prefill else None,
        "decode_worker": candidate.decode.worker_id,
        "computed_by": candidate.computes.worker_id,  # the prompt
        "prefill_held_tokens": candidate.prefill_held_tokens,
        "decode_held_tokens": candidate.decode_held_tokens,
        "fetched_from": [source.view.worker_id for source in candidate.sources],
        "prefill_fetched_from": [source.view.worker_id for source in candidate.returns],
        **terms,
        "total_ms": round(candidate.terms.total_ms, 3),
    }


def _prefill_worker(run: RequestState, handover: dict[str, Any] | None) -> str | None:
    """Name of the worker that did the prefill; before the end, of the one that was asked to."""
    if handover is not None:
        return handover["prefill_worker"] or None
    peers = run.current.choice.prefill_peers if run.current else ()
    return peers[0].worker_id if peers else None


def _pace(run: RequestState) -> dict[str, float] | None:
    gaps = run.token_gaps_s
    if not gaps:
        return None
    mean_s = statistics.fmean(gaps)
    return {"mean": _ms(mean_s), "p50": _ms(statistics.median(gaps)), "max": _ms(max(gaps))}


def _between_ms(run: RequestState, start: Instant, end: Instant) -> float | None:
    seconds = run.timeline.between_s(start, end)
    return None if seconds is None else _ms(seconds)


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)
