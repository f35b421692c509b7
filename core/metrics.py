"""Metrics under vLLM's names, which dashboards and schedulers read, with their meaning in Twostroke.

Source of names, types and labels: vLLM's metrics (docs/design/metrics, v1/metrics)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..core import buckets
from .board import Board, Kind, Metric
from .discovery.source import AddressSource
from .life import Life
from .request import FinishReason
from .tally import Spread

# ------------------------------------------------------------------ of requests, at their end

TTFT = Metric("vllm:time_to_first_token_seconds", Kind.HISTOGRAM, "From arrival to the first token", buckets.TTFT_S)
ITL = Metric(
    "vllm:inter_token_latency_seconds", Kind.HISTOGRAM, "From one token of a choice to its next", buckets.ITL_S
)
E2E = Metric(
    "vllm:e2e_request_latency_seconds", Kind.HISTOGRAM, "From arrival to the end of a request", buckets.LATENCY_S
)
QUEUE = Metric(
    "vllm:request_queue_time_seconds",
    Kind.HISTOGRAM,
    "From admission until the prompt's first chunk entered a step",
    buckets.LATENCY_S,
)
PREFILL = Metric(
    "vllm:request_prefill_time_seconds",
    Kind.HISTOGRAM,
    "From the first chunk in a step to the first token",
    buckets.LATENCY_S,
)
DECODE = Metric(
    "vllm:request_decode_time_seconds", Kind.HISTOGRAM, "From the first token to the last", buckets.LATENCY_S
)
INFERENCE = Metric(
    "vllm:request_inference_time_seconds",
    Kind.HISTOGRAM,
    "From the first chunk in a step to the last token",
    buckets.LATENCY_S,
)
TIME_PER_TOKEN = Metric(
    "vllm:request_time_per_output_token_seconds", Kind.HISTOGRAM, "Decode time per token after the first", buckets.ITL_S
)
PROMPT_LENGTH = Metric("vllm:request_prompt_tokens", Kind.HISTOGRAM, "Prompt tokens of a request", buckets.TOKENS)
GENERATION_LENGTH = Metric(
    "vllm:request_generation_tokens", Kind.HISTOGRAM, "Generated tokens of a choice", buckets.TOKENS
)
LONGEST_GENERATION = Metric(
    "vllm:request_max_num_generation_tokens",
    Kind.HISTOGRAM,
    "Generated tokens of a request's longest choice",
    buckets.TOKENS,
)
PARAMS_N = Metric(
    "vllm:request_params_n", Kind.HISTOGRAM, "n of a request; a worker's sequences are single", (1, 2, 5, 10, 20)
)
PARAMS_MAX_TOKENS = Metric("vllm:request_params_max_tokens", Kind.HISTOGRAM, "max_tokens of a request", buckets.TOKENS)
PREFILL_COMPUTED = Metric(
    "vllm:request_prefill_kv_computed_tokens",
    Kind.HISTOGRAM,
    "Prompt tokens of a request whose KV was computed for it: neither cached nor, at a worker, handed over",
    buckets.TOKENS,
)
SUCCESS = Metric("vllm:request_success", Kind.COUNTER, "Ended choices by reason", labels=("finished_reason",))
PROMPT_TOKENS = Metric("vllm:prompt_tokens", Kind.COUNTER, "Prompt tokens of finished requests")
CACHED_TOKENS = Metric(
    "vllm:prompt_tokens_cached", Kind.COUNTER, "Prompt tokens whose KV was cached or, at a worker, handed over"
)
PREFIX_QUERIES = Metric("vllm:prefix_cache_queries", Kind.COUNTER, "Prompt tokens looked up in prefix caches")
PREFIX_HITS = Metric("vllm:prefix_cache_hits", Kind.COUNTER, "Prompt tokens found in prefix caches")
EXTERNAL_QUERIES = Metric(
    "vllm:external_prefix_cache_queries", Kind.COUNTER, "Prompt tokens that decode workers asked prefill workers for"
)
EXTERNAL_HITS = Metric("vllm:external_prefix_cache_hits", Kind.COUNTER, "Prompt tokens whose KV was handed over")
TRANSFER_SECONDS = Metric(
    "twostroke_handover_transfer_seconds",
    Kind.HISTOGRAM,
    "From a hand-over's first frame to its last; it overlaps the prefill of later chunks",
    buckets.TRANSFER_S,
)
TRANSFER_BYTES = Metric(
    "twostroke_handover_bytes", Kind.HISTOGRAM, "Bytes of a hand-over: planes, scales, headers", buckets.TRANSFER_BYTES
)

OF_REQUESTS = (
    *(TTFT, ITL, E2E, QUEUE, PREFILL, DECODE, INFERENCE, TIME_PER_TOKEN),
    *(PROMPT_LENGTH, GENERATION_LENGTH, LONGEST_GENERATION, PARAMS_N, PARAMS_MAX_TOKENS, PREFILL_COMPUTED),
    *(PROMPT_TOKENS, CACHED_TOKENS, PREFIX_QUERIES, PREFIX_HITS, EXTERNAL_QUERIES, EXTERNAL_HITS),
    *(TRANSFER_SECONDS, TRANSFER_BYTES),
)

# ------------------------------------------------------------------ of engines, while they run

GENERATION_TOKENS = Metric("vllm:generation_tokens", Kind.COUNTER, "Generated tokens")
PREEMPTIONS = Metric("vllm:num_preemptions", Kind.COUNTER, "Running sequences that gave their blocks back for others")
SPEC_DRAFTS = Metric("vllm:spec_decode_num_drafts", Kind.COUNTER, "Guesses of speculative decoding that were checked")
SPEC_DRAFT_TOKENS = Metric("vllm:spec_decode_num_draft_tokens", Kind.COUNTER, "Tokens of these guesses")
SPEC_ACCEPTED_TOKENS = Metric(
    "vllm:spec_decode_num_accepted_tokens", Kind.COUNTER, "Tokens of these guesses that were right"
)
SPECULATION_TOKENS = Metric(
    "twostroke_speculation_tokens",
    Kind.COUNTER,
    "Tokens that speculative decoding guessed, by what guessed them, and those that were right",
    labels=("proposer", "outcome"),
)
PROPOSERS, OUTCOMES = (
    ("ngram", "draft_model", "medusa", "eagle3", "mtp"),
    {"draft_tokens": "guessed", "accepted_tokens": "accepted"},
)
DRAFT_CATCH_UP = Metric(
    "twostroke_draft_model_caught_up_tokens",
    Kind.COUNTER,
    "Prompt and output tokens that the draft model computed in chunks before it could guess",
)
DRAFT_FAILURES = Metric(
    "twostroke_draft_model_failures",
    Kind.COUNTER,
    "Sequences that went on without guesses after the draft model or the heads failed",
)
CORRUPTED = Metric(
    "vllm:corrupted_requests", Kind.COUNTER, "Requests that ended because a number in them was not finite"
)
HANDOVER_FAILURES = Metric(
    "twostroke_handover_failures", Kind.COUNTER, "Hand-overs that broke, fell silent, came damaged or were refused"
)
HANDOVER_EXPIRED = Metric(
    "twostroke_handover_expired", Kind.COUNTER, "Prompts whose KV a prefill worker freed because decode fell silent"
)
HANDOVER_GARBLED = Metric(
    "twostroke_handover_garbled", Kind.COUNTER, "Envelopes on hand-over streams that could not be read"
)
FETCHED_BLOCKS = Metric(
    "twostroke_fetched_blocks",
    Kind.COUNTER,
    "Hash blocks fetched from other workers' caches for requests that go on here",
)
FETCHED_BYTES = Metric("twostroke_fetched_bytes", Kind.COUNTER, "Bytes of fetches from other workers' caches")
SERVED_BLOCKS = Metric(
    "twostroke_fetch_served_blocks", Kind.COUNTER, "Hash blocks that other workers fetched from here"
)
SERVED_BYTES = Metric("twostroke_fetch_served_bytes", Kind.COUNTER, "Bytes of these blocks, without headers")
FETCH_FAILURES = Metric("twostroke_fetch_failures", Kind.COUNTER, "Fetches that ended otherwise than complete or short")
PREFILL_FETCHED = Metric(
    "twostroke_prefill_fetched_tokens",
    Kind.COUNTER,
    "Prompt tokens whose KV a prefill worker fetched from decode workers instead of computing it",
)
ITERATION_TOKENS = Metric(
    "vllm:iteration_tokens_total", Kind.HISTOGRAM, "Tokens computed in an engine step", buckets.STEP_TOKENS
)
BLOCK_LIFETIME = Metric(
    "vllm:kv_block_lifetime_seconds",
    Kind.HISTOGRAM,
    "From a block's taking to the eviction of its cached KV (sampled)",
    buckets.RESIDENCY_S,
)
BLOCK_IDLE = Metric(
    "vllm:kv_block_idle_before_evict_seconds",
    Kind.HISTOGRAM,
    "From the last time that a sequence took or found a block to its eviction (sampled)",
    buckets.RESIDENCY_S,
)
BLOCK_REUSE_GAP = Metric(
    "vllm:kv_block_reuse_gap_seconds",
    Kind.HISTOGRAM,
    "From one use of a cached block to its next (sampled)",
    buckets.RESIDENCY_S,
)

COUNTED_BY_ENGINES = {
    PREEMPTIONS: ("preemptions",),
    SPEC_DRAFTS: ("spec_decode_num_drafts",),
    SPEC_DRAFT_TOKENS: ("spec_decode_num_draft_tokens",),
    SPEC_ACCEPTED_TOKENS: ("spec_decode_num_accepted_tokens",),
    DRAFT_CATCH_UP: ("draft_model_caught_up_tokens",),
    DRAFT_FAILURES: ("draft_model_failures",),
    CORRUPTED: ("ended_non_finite_kv",),
    HANDOVER_FAILURES: tuple(
        f"handover_lost_{end}" for end in ("failed", "closed", "silent", "protocol", "corrupted", "transport")
    ),
    HANDOVER_EXPIRED: ("handover_aborted_silent",),
    HANDOVER_GARBLED: ("handover_garbled",),
    FETCHED_BLOCKS: ("fetched_blocks",),
    FETCHED_BYTES: ("fetched_bytes",),
    SERVED_BLOCKS: ("fetch_served_blocks",),
    SERVED_BYTES: ("fetch_served_bytes",),
    PREFILL_FETCHED: ("prefill_fetched_tokens",),
    FETCH_FAILURES: tuple(f"fetch_{end}" for end in ("empty", "closed", "silent", "protocol", "corrupted", "deadline")),
}
"""Each metric is the sum of these counters of a load report."""

SIDES = ("decode", "prefill")
"""The sides of a hand-over, the values of the label `side`: who receives KV, and who sends it."""


def _of_handovers(name: str, text: str) -> Metric:
    return Metric(f"twostroke_handover_{name}", Kind.COUNTER, text, labels=("side",))


HANDOVER_STREAMS = {
    "messages_sent": _of_handovers("messages_sent", "Messages written to hand-over streams, frames and beats included"),
    "messages_received": _of_handovers(
        "messages_received", "Messages accepted from hand-over streams, frames and beats included"
    ),
    "frames": _of_handovers("frames", "Frames of KV sent (prefill) or accepted (decode), refetched ones included"),
    "frame_bytes": _of_handovers(
        "frame_bytes", "Bytes of these frames: planes and scales where they are sent, with headers where they arrive"
    ),
    "shared_frames": _of_handovers("shared_frames", "Frames of these whose planes went through shared memory"),
    "shared_bytes": _of_handovers("shared_bytes", "Bytes of the frames whose planes went through shared memory"),
    "duplicates": _of_handovers("duplicates", "Messages dropped because their sequence had been seen"),
    "stale": _of_handovers("stale", "Messages dropped because they are of an older dispatch"),
    "gaps": _of_handovers("gaps", "Missing sequences; each ended its hand-over"),
    "refetches": _of_handovers("refetches", "Token ranges asked for (decode) or sent (prefill) once more"),
    "late": _of_handovers("late", "Events that came after the end of their hand-over"),
    "mismatches": _of_handovers(
        "mismatches", "KV that did not match its digests: frames that arrived (decode), reads to be sent (prefill)"
    ),
}
"""Counters of both sides of hand-overs, by the field of kv/handover/machine.py: Counters."""

_MISMATCHES = {"decode": "kv_corrupted_frames", "prefill": "kv_corrupted_reads"}


def _handover_counter(side: str, field: str) -> str:
    """The counter of a load report that holds a field of one side; see kv/handover/exported.py."""
    return _MISMATCHES[side] if field == "mismatches" else f"handover_{side}_{field}"


GUARD_DIVERGENCE = Metric(
    "twostroke_kv_cache_divergence_nats",
    Kind.HISTOGRAM,
    "Sampled prompts: KL per token of a bfloat16 cache against the served one (cache.guard_bound)",
    buckets.NATS,
)
GUARD_EXCEEDED = Metric(
    "twostroke_kv_cache_guard_exceeded", Kind.GAUGE, "Workers whose KV cache differs by more than cache.guard_bound"
)
GUARD_FELL_BACK = Metric(
    "twostroke_kv_cache_fell_back",
    Kind.GAUGE,
    "Workers that serve a bfloat16 cache because their own codec differed by more than cache.guard_bound",
)

SPREAD_BY_ENGINES = {
    "iteration_tokens": ITERATION_TOKENS,
    "block_lifetime_s": BLOCK_LIFETIME,
    "block_idle_s": BLOCK_IDLE,
    "block_reuse_gap_s": BLOCK_REUSE_GAP,
    "kv_guard_nats": GUARD_DIVERGENCE,
}
"""Histograms by their name in a load report."""

OF_ENGINES = (GENERATION_TOKENS, *COUNTED_BY_ENGINES, GUARD_EXCEEDED, GUARD_FELL_BACK, *SPREAD_BY_ENGINES.values())

RUNNING = Metric("vllm:num_requests_running", Kind.GAUGE, "Sequences that steps compute")
WAITING = Metric("vllm:num_requests_waiting", Kind.GAUGE, "Sequences before their first step")
KV_USAGE = Metric("vllm:kv_cache_usage_perc", Kind.GAUGE, "KV blocks in use, 1 = all of them")

GAUGES = (RUNNING, WAITING, KV_USAGE)

QUEUED_PROMPT_TOKENS = Metric(
    "twostroke_queued_prompt_tokens", Kind.GAUGE, "Prompt tokens at a worker that no step has computed yet"
)

DISCOVERY_ADDRESSES = Metric(
    "twostroke_discovery_addresses",
    Kind.GAUGE,
    "Addresses of other processes that a name stands for, the last known ones",
    labels=("source",),
)
DISCOVERY_STALE = Metric(
    "twostroke_discovery_stale",
    Kind.GAUGE,
    "1 if they may be out of date or are none, because the name is not found or the API server is away; else 0",
    labels=("source",),
)

CACHE_CONFIG = Metric(
    "vllm:cache_config_info",
    Kind.GAUGE,
    "A worker's KV pool; always 1, the labels say it",
    labels=(
        *("block_size", "num_gpu_blocks", "num_cpu_blocks", "cache_dtype"),
        *("enable_prefix_caching", "gpu_memory_utilization", "swap_space"),
    ),
)
CACHE_POOL = Metric(
    "vllm:cache_config_info",
    Kind.GAUGE,
    "The KV pools of the connected workers; always 1, the labels say it",
    labels=("block_size", "num_gpu_blocks"),
)
WAITING_BY_REASON = Metric(
    "vllm:num_requests_waiting_by_reason",
    Kind.GAUGE,
    "Of the waiting: for blocks and seats here (capacity), or for the other worker of a hand-over (deferred)",
    labels=("reason",),
)
TOKENS_BY_SOURCE = Metric(
    "vllm:prompt_tokens_by_source", Kind.COUNTER, "Prompt tokens by where their KV came from", labels=("source",)
)
SLEEP_STATE = Metric(
    "vllm:engine_sleep_state", Kind.GAUGE, "An engine that answers is awake; none ever sleeps", labels=("sleep_state",)
)
LORA = Metric(
    "vllm:lora_requests_info",
    Kind.GAUGE,
    "Names of the adapters that sequences have now, joined by commas; 1 if there are some. max_lora: as many are held",
    labels=("max_lora", "waiting_lora_adapters", "running_lora_adapters"),
)

# ------------------------------------------------------------------ counting

REASONS = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.CANCELLED: "abort",
    FinishReason.ERROR: "error",
}
"""vLLM's names of the finish reasons."""


def know(board: Board, *labels: str) -> None:
    """Create every series of requests and engines with the value zero, for these leading labels."""
    board.know((*OF_REQUESTS, *OF_ENGINES, *GAUGES), *labels)
    for proposer in PROPOSERS:
        for outcome in OUTCOMES.values():
            board.know((SPECULATION_TOKENS,), *labels, proposer, outcome)
    for side in SIDES:
        board.know(HANDOVER_STREAMS.values(), *labels, side)
    for word in REASONS.values():
        board.know((SUCCESS,), *labels, word)


def count_life(board: Board, life: Life, *labels: str) -> None:
    """Count a finished request. A cancelled or failed one adds no length and no total latency."""

    def observe(metric: Metric, value: float | None) -> None:
        if value is not None:
            board.observe(metric, *labels, value=value)

    for reason in life.reasons:
        board.add(SUCCESS, *labels, REASONS[reason])
    observe(TTFT, life.ttft_s)
    for gap_s in life.gaps_s:
        board.observe(ITL, *labels, value=gap_s)
    board.add(EXTERNAL_QUERIES, *labels, amount=life.asked_tokens)
    board.add(EXTERNAL_HITS, *labels, amount=life.moved_tokens)
    for transfer in life.transfers:
        observe(TRANSFER_SECONDS, transfer.duration_s)
        observe(TRANSFER_BYTES, transfer.num_bytes)
    if life.is_finished:
        _count_finished(board, life, *labels)


def count_engines(board: Board, counters: Mapping[str, int], spreads: Mapping[str, Spread], *labels: str) -> None:
    """Set the counts of engines since their start. A histogram with other buckets than ours is ignored."""
    for metric, names in COUNTED_BY_ENGINES.items():
        board.set(metric, *labels, value=sum(counters.get(name, 0) for name in names))
    for proposer in PROPOSERS:
        for field, outcome in OUTCOMES.items():
            board.set(SPECULATION_TOKENS, *labels, proposer, outcome, value=counters.get(f"{proposer}_{field}", 0))
    for side in SIDES:
        for field, metric in HANDOVER_STREAMS.items():
            board.set(metric, *labels, side, value=counters.get(_handover_counter(side, field), 0))
    board.set(GUARD_EXCEEDED, *labels, value=counters.get("kv_guard_exceeded", 0))
    board.set(GUARD_FELL_BACK, *labels, value=counters.get("kv_guard_fell_back", 0))
    for name, metric in SPREAD_BY_ENGINES.items():
        spread = spreads.get(name)
        if spread is not None and len(spread.counts) == len(metric.bounds) + 1:
            board.put(metric, *labels, spread=spread)


def count_sources(board: Board, sources: Iterable[AddressSource], *labels: str) -> None:
    """Set the gauges of what finds other processes."""
    for source in sources:
        board.set(DISCOVERY_ADDRESSES, *labels, source.name, value=len(source.addresses))
        board.set(DISCOVERY_STALE, *labels, source.name, value=float(bool(source.problem)))


def _count_finished(board: Board, life: Life, *labels: str) -> None:
    board.add(PROMPT_TOKENS, *labels, amount=life.prompt_tokens)
    board.add(CACHED_TOKENS, *labels, amount=life.prompt_tokens - life.computed_tokens)
    board.add(PREFIX_QUERIES, *labels, amount=life.prompt_tokens)
    board.add(PREFIX_HITS, *labels, amount=life.cached_tokens)
    phases, decode_s = life.phases, life.phases.decode_s
    after_first = life.generated[0] - 1
    values: dict[Metric, float | None] = {
        E2E: life.e2e_s,
        QUEUE: phases.queue_s,
        PREFILL: phases.prefill_s,
        DECODE: decode_s,
        INFERENCE: phases.inference_s,
        TIME_PER_TOKEN: decode_s / after_first if decode_s is not None and after_first > 0 else None,
        PROMPT_LENGTH: life.prompt_tokens,
        LONGEST_GENERATION: max(life.generated),
        PARAMS_N: len(life.generated),
        PARAMS_MAX_TOKENS: life.max_tokens,
        PREFILL_COMPUTED: life.computed_tokens,
    }
    for metric, value in values.items():
        if value is not None:
            board.observe(metric, *labels, value=value)
    for count in life.generated:
        board.observe(GENERATION_LENGTH, *labels, value=count)
