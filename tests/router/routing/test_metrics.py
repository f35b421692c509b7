"""What requests and engines leave in the metrics: sums that never fall, buckets, phases, reasons."""

from __future__ import annotations

import dataclasses

import pytest
from prometheus_client import CollectorRegistry

from twostroke.core import buckets, metrics
from twostroke.core.board import Board, Kind, Metric, render
from twostroke.core.life import Life, Transfer
from twostroke.core.request import FinishReason
from twostroke.core.tally import Spread
from twostroke.core.timeline import Instant, Phases, Timeline
from twostroke.router.routing.engine_totals import EngineTotals
from twostroke.router.routing.facts import LoadFacts, WorkerKey

LIFE = Life(
    prompt_tokens=100,
    max_tokens=64,
    generated=(5, 9),
    reasons=(FinishReason.STOP, FinishReason.LENGTH),
    phases=Phases(0.25, 0.5, 2.0, 2.5),
    ttft_s=0.75,
    e2e_s=3.0,
    gaps_s=(0.5, 0.5, 0.5, 0.5),
    cached_tokens=32,
    computed_tokens=68,
    asked_tokens=84,
    moved_tokens=84,
    transfers=(Transfer(4096, 0.01),),
)


class Counted:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.board = Board(self.registry, ("model_name",))

    def __call__(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, {"model_name": "m", **labels})


# ---------------------------------------------------------------- one request


def test_a_finished_request_leaves_every_metric_of_requests():
    counted = Counted()
    metrics.know(counted.board, "m")
    before = {sample.name: sample.value for family in counted.board.collect() for sample in family.samples}
    assert set(before.values()) == {0.0}
    metrics.count_life(counted.board, LIFE, "m")
    for metric in metrics.OF_REQUESTS:
        assert counted(metric.name + ("_count" if metric.kind is Kind.HISTOGRAM else "_total")), metric.name
    sums = {
        "request_queue_time_seconds": 0.25,
        "request_prefill_time_seconds": 0.5,
        "request_decode_time_seconds": 2.0,
        "request_inference_time_seconds": 2.5,
        "request_time_per_output_token_seconds": 0.5,
        "request_prompt_tokens": 100,
        "request_generation_tokens": 14,
        "request_max_num_generation_tokens": 9,
        "request_params_n": 2,
        "request_params_max_tokens": 64,
        "request_prefill_kv_computed_tokens": 68,
    }
    assert {name: counted(f"vllm:{name}_sum") for name in sums} == sums
    assert counted("vllm:prompt_tokens_cached_total") == 32
    assert counted("vllm:external_prefix_cache_hits_total") == 84
    assert counted("vllm:request_success_total", finished_reason="stop") == 1
    assert counted("vllm:request_success_total", finished_reason="length") == 1


@pytest.mark.parametrize(
    ("reason", "word"), [(FinishReason.CANCELLED, "abort"), (FinishReason.ERROR, "error")], ids=["abort", "error"]
)
def test_one_that_did_not_finish_leaves_its_reason_and_no_length(reason: FinishReason, word: str):
    counted = Counted()
    metrics.know(counted.board, "m")
    metrics.count_life(counted.board, dataclasses.replace(LIFE, generated=(5,), reasons=(reason,)), "m")
    assert counted("vllm:request_success_total", finished_reason=word) == 1
    assert counted("vllm:time_to_first_token_seconds_count") == 1
    assert counted("vllm:e2e_request_latency_seconds_count") == 0
    assert counted("vllm:request_prompt_tokens_count") == 0


def test_phases_are_differences_of_instants():
    timeline = Timeline()
    assert timeline.phases(1.0) == Phases(None, None, None, None)
    timeline.mark(Instant.PREFILL_BEGAN, 3.0)
    timeline.mark(Instant.PREFILLED, 4.0)
    assert timeline.phases(1.0) == Phases(2.0, 1.0, 0.0, 1.0)  # as a prefill worker has it
    timeline.mark(Instant.FIRST_TOKEN, 4.5)
    timeline.mark(Instant.LAST_TOKEN, 9.5)
    assert timeline.phases(1.0) == Phases(2.0, 1.5, 5.0, 6.5)


# ---------------------------------------------------------------- exposition


def test_a_value_belongs_to_the_bucket_whose_bound_it_equals():
    counted = Counted()
    metric = Metric("some_seconds", Kind.HISTOGRAM, "Some", (0.5, 1))
    for value in (0.5, 0.6, 1.0, 7.0):
        counted.board.observe(metric, "m", value=value)
    buckets_ = {le: counted("some_seconds_bucket", le=le) for le in ("0.5", "1.0", "+Inf")}
    assert buckets_ == {"0.5": 1, "1.0": 3, "+Inf": 4}
    assert (counted("some_seconds_count"), counted("some_seconds_sum")) == (4, 9.1)


@pytest.mark.parametrize(
    ("accept", "kind", "end"),
    [
        ("", "text/plain", b"\n"),
        ("application/openmetrics-text; version=1.0.0", "application/openmetrics-text", b"# EOF\n"),
        ("application/openmetrics-text; version=1.0.0; escaping=underscores, */*", "application/openm", b"# EOF\n"),
    ],
)
def test_the_format_is_the_one_that_was_asked_for(accept: str, kind: str, end: bytes):
    counted = Counted()
    metrics.know(counted.board, "m")
    body, content_type = render(counted.registry, accept)
    assert content_type.startswith(kind)
    assert body.endswith(end)
    assert b'\nvllm:prompt_tokens_total{model_name="m"} 0.0\n' in body


VLLM_BOUNDS = {
    "TTFT_S": (0.001, 0.02, 0.1, 0.75, 2.5, 7.5, 40, 160, 640, 2560),
    "ITL_S": (0.01, 0.025, 0.075, 0.15, 0.3, 0.75, 1, 2.5, 7.5, 20, 80),
    "LATENCY_S": (0.3, 0.5, 0.8, 1, 1.5, 2.5, 15, 30, 50, 60, 240, 960, 1920, 7680),
    "TOKENS": (1, 2, 5, 10, 20, 50, 1000, 20_000, 100_000),
    "STEP_TOKENS": (1, 8, 16, 512, 8192, 16384),
    "RESIDENCY_S": (0.001, 0.02, 0.5, 1, 20, 30, 300, 1800),
}


@pytest.mark.parametrize("name", VLLM_BOUNDS)
def test_a_query_for_one_of_vllms_bounds_finds_it(name: str):
    ours = getattr(buckets, name)
    assert set(VLLM_BOUNDS[name]) <= set(ours)
    assert list(ours) == sorted(set(ours))


# ---------------------------------------------------------------- all workers of a model


def load(preemptions: int, *counts: int) -> LoadFacts:
    return LoadFacts(
        counters=(("preemptions", preemptions),), spreads=(("iteration_tokens", Spread(counts, float(sum(counts)))),)
    )


def test_sums_over_workers_survive_them():
    totals, first, second = EngineTotals(), WorkerKey("a", 1), WorkerKey("a", 2)
    totals.take(first, load(3, 1, 2))
    totals.take(first, load(5, 1, 4))
    totals.take(first, load(5, 1, 4))
    totals.forget(first)
    totals.take(second, load(1, 2, 0))  # the same worker, started again
    assert totals.counters["preemptions"] == 6
    assert totals.spreads == {"iteration_tokens": Spread((3, 4), 7.0)}


def test_a_histogram_with_other_buckets_is_left_out():
    totals, counted = EngineTotals(), Counted()
    totals.take(WorkerKey("a", 1), load(1, 1, 2))
    totals.take(WorkerKey("b", 1), load(1, 1, 2, 3))
    assert totals.spreads == {"iteration_tokens": Spread((1, 2), 3.0)}
    metrics.know(counted.board, "m")
    metrics.count_engines(counted.board, totals.counters, totals.spreads, "m")
    assert counted("vllm:num_preemptions_total") == 2
    assert counted("vllm:iteration_tokens_total_count") == 0


def test_every_report_adds_what_it_counted_since_the_last_one():
    totals = EngineTotals()
    reports = {  # of two workers, and of a second life of the first: counters and a histogram, from their own start
        WorkerKey("a", 1): [(3, (1, 0)), (3, (1, 0)), (10, (4, 2))],
        WorkerKey("b", 1): [(5, (0, 1)), (6, (2, 1))],
        WorkerKey("a", 2): [(2, (1, 1))],
    }
    for key, seen in reports.items():
        for count, counts in seen:
            spread = Spread(counts, float(sum(counts)))
            totals.take(key, LoadFacts(counters=(("steps", count),), spreads=(("s", spread),)))
    assert totals.counters == {"steps": 10 + 6 + 2}
    assert totals.spreads == {"s": Spread((4 + 2 + 1, 2 + 1 + 1), 11.0)}
    totals.forget(WorkerKey("b", 1))
    assert totals.counters == {"steps": 18}
