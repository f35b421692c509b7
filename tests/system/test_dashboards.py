"""Public dashboards and load generators against a live cluster: each of their queries finds a series.

The tables are ours: which metrics vLLM's Grafana dashboards (examples/observability) and inference-perf's client of
vLLM read, in which form and by which labels.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from support.deploy.promql import Selector, Series, groupings, scrape, selectors, unanswered

from twostroke import Client

MODEL = "twostroke-bundled"

QUANTILE = "histogram_quantile(0.99, sum by(le) (rate({m}_bucket{{{f}}}[$__rate_interval])))"
QUANTILE_BY_MODEL = "histogram_quantile(0.5, sum by(le, model_name) (rate({m}_bucket{{{f}}}[$__range])))"
MEAN = "rate({m}_sum{{{f}}}[$__rate_interval])\n/\n(rate({m}_count{{{f}}}[$__rate_interval]) > 0)"
BARE_MEAN = "sum(increase({m}_sum[$__range])) / sum(increase({m}_count[$__range]))"
HEATMAP = "sum by(le) (increase({m}_bucket{{{f}}}[$__rate_interval]))"
SUM_RATE = "rate({m}_sum{{{f}}}[$__rate_interval])"
RATE = "sum by (model_name) (rate({m}_total{{{f}}}[$__rate_interval]))"
GAUGE = "{m}{{{f}}}"

SERVICE = {
    "vllm:e2e_request_latency_seconds": (QUANTILE, QUANTILE_BY_MODEL, MEAN, BARE_MEAN),
    "vllm:time_to_first_token_seconds": (QUANTILE, QUANTILE_BY_MODEL, MEAN, BARE_MEAN),
    "vllm:inter_token_latency_seconds": (QUANTILE, MEAN, BARE_MEAN),
    "vllm:request_time_per_output_token_seconds": (QUANTILE, MEAN),
    "vllm:request_prompt_tokens": (HEATMAP, QUANTILE_BY_MODEL),
    "vllm:request_generation_tokens": (HEATMAP, QUANTILE_BY_MODEL),
    "vllm:request_max_num_generation_tokens": (SUM_RATE,),
    "vllm:request_queue_time_seconds": (SUM_RATE, QUANTILE),
    "vllm:request_prefill_time_seconds": (SUM_RATE, QUANTILE),
    "vllm:request_decode_time_seconds": (SUM_RATE, QUANTILE),
    "vllm:request_inference_time_seconds": (SUM_RATE, QUANTILE),
    "vllm:prompt_tokens": (RATE,),
    "vllm:generation_tokens": (RATE,),
    "vllm:num_requests_running": (GAUGE,),
    "vllm:num_requests_waiting": (GAUGE,),
    "vllm:kv_cache_usage_perc": (GAUGE,),
    "vllm:request_success": ("sum by(finished_reason) (increase({m}_total{{{f}}}[$__rate_interval]))",),
}
"""vLLM's dashboards of a service: filtered by model alone."""

_PER_ENGINE = "sum by (instance, engine) (rate({m}_total{{{f}}}[$__rate_interval]))"
ENGINES = {
    "vllm:kv_cache_usage_perc": ("max by (instance, engine) ({m}{{{f}}})",),
    "vllm:num_requests_running": ("count({m}{{{f}}})",),
    "vllm:num_requests_waiting_by_reason": ('sum({m}{{{f}, reason="capacity"}})', 'sum({m}{{{f}, reason="deferred"}})'),
    "vllm:num_preemptions": (_PER_ENGINE,),
    "vllm:prefix_cache_hits": (_PER_ENGINE,),
    "vllm:prefix_cache_queries": (_PER_ENGINE,),
    "vllm:external_prefix_cache_hits": (_PER_ENGINE,),
    "vllm:external_prefix_cache_queries": (_PER_ENGINE,),
    "vllm:prompt_tokens_cached": (_PER_ENGINE,),
    "vllm:prompt_tokens": (_PER_ENGINE,),
    "vllm:prompt_tokens_by_source": tuple(
        'sum(rate({m}_total{{{f}, source="' + source + '"}}[$__rate_interval]))'
        for source in ("local_compute", "local_cache_hit", "external_kv_transfer")
    ),
    "vllm:request_prefill_kv_computed_tokens": (MEAN,),
    "vllm:kv_block_lifetime_seconds": (QUANTILE, MEAN),
    "vllm:kv_block_idle_before_evict_seconds": (QUANTILE, MEAN),
    "vllm:kv_block_reuse_gap_seconds": (QUANTILE, MEAN),
    "vllm:engine_sleep_state": ('(2 - (max({m}{{{f}, sleep_state="awake"}}) == bool 0)) or vector(0)',),
}
"""vLLM's dashboard of engines and their KV caches: filtered by model and engine."""

LOAD_GENERATOR = {
    "GAUGE": ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"),
    "COUNTER": (
        *("prompt_tokens", "generation_tokens", "request_success", "num_preemptions", "prompt_tokens_cached"),
        *("prefix_cache_hits", "prefix_cache_queries", "external_prefix_cache_hits", "external_prefix_cache_queries"),
        "corrupted_requests",
    ),
    "HISTOGRAM": (
        *("e2e_request_latency_seconds", "time_to_first_token_seconds", "inter_token_latency_seconds"),
        *("request_time_per_output_token_seconds", "request_queue_time_seconds", "request_inference_time_seconds"),
        *("request_prefill_time_seconds", "request_decode_time_seconds", "request_prompt_tokens"),
        *("request_generation_tokens", "request_max_num_generation_tokens", "request_params_n"),
        *("request_params_max_tokens", "iteration_tokens_total", "request_prefill_kv_computed_tokens"),
        *("kv_block_idle_before_evict_seconds", "kv_block_lifetime_seconds", "kv_block_reuse_gap_seconds"),
    ),
}
"""inference-perf's 31."""

FORMS = {
    "GAUGE": ("quantile_over_time(0.9, vllm:{m}{{{f}}}[60s])",),
    "COUNTER": ("sum(increase({{__name__=~'vllm:{m}(_total)?',{f}}}[60s]))",),
    "HISTOGRAM": (
        "sum(rate(vllm:{m}_sum{{{f}}}[60s])) / (sum(rate(vllm:{m}_count{{{f}}}[60s])) > 0)",
        "histogram_quantile(0.5, sum(rate(vllm:{m}_bucket{{{f}}}[60s])) by (le))",
    ),
}


def queries() -> Iterator[tuple[str, str]]:
    """(who answers, query): router and workers answer for the service, workers for the engines."""
    for metric, forms in SERVICE.items():
        yield from (("all", form.format(m=metric, f=f'model_name="{MODEL}"')) for form in forms)
    by_engine = f'job=~".*", model_name=~"{MODEL}", instance=~".*", engine=~".+"'
    for metric, forms in ENGINES.items():
        yield from (("workers", form.format(m=metric, f=by_engine)) for form in forms)
    for kind, names in LOAD_GENERATOR.items():
        for name in names:
            yield from (("all", form.format(m=name, f=f"model_name='{MODEL}'")) for form in FORMS[kind])


def our_queries() -> list[str]:
    """Those of the dashboard that stands in this repository."""
    file = Path(__file__).parents[2] / "deploy/dashboards/handover.json"
    found = [target["expr"] for panel in json.loads(file.read_text())["panels"] for target in panel["targets"]]
    return [query.replace("$model_name", MODEL).replace("$engine", ".*") for query in found]


@pytest.fixture(scope="module")
def doors(cluster) -> dict[str, str]:
    """Metrics of the router and of each worker, by name: their URLs."""
    workers = httpx.get(cluster.url + "/v1/cluster").json()["workers"]
    return {"router": cluster.url} | {w["worker_id"]: f"http://{w['metrics_address']}" for w in workers}


def scraped(url: str) -> list[Series]:
    return scrape(httpx.get(url + "/metrics", timeout=60).text)


def value(series: list[Series], name: str, **labels: str) -> float:
    """The sum of what a name and some labels select."""
    return sum(s.value for s in series if s.name == name and labels.items() <= s.labels.items())


# ---------------------------------------------------------------- the parser


def test_the_parser_reads_what_a_query_selects():
    query = 'sum by (le, a) (rate(x:y_bucket{job="j", a=~"b|c"}[5m])) / on () (max(z) > bool 0) or vector(0)'
    assert list(selectors(query)) == [
        Selector("x:y_bucket", (("job", "=", "j"), ("a", "=~", "b|c"))),
        Selector("z", ()),
    ]
    assert groupings(query) == {"le", "a"}
    scraped_ = [Series("x:y_bucket", {"a": "c", "le": "1"}, 1.0), Series("z", {"le": "1", "a": ""}, 1.0)]
    assert unanswered(query, scraped_) == []
    assert unanswered(query, scraped_[1:]) == ["x:y_bucket"]
    assert unanswered(query, [Series("x:y_bucket", {"a": "c"}, 1.0), scraped_[1]]) == ["x:y_bucket by le"]


# ---------------------------------------------------------------- every query


def test_every_query_finds_a_series_before_the_first_request(doors):
    assert set(doors) == {"router", "prefill-0", "decode-0"}
    assert sum(map(len, LOAD_GENERATOR.values())) == 31
    asked = list(queries())
    for name, url in doors.items():
        series = scraped(url)
        for who, query in asked:
            if who == "all" or name != "router":
                assert not unanswered(query, series), (name, query)
        for query in our_queries():
            assert not unanswered(query, series), (name, query)


def test_schedulers_find_the_size_of_each_pool(doors):
    for name in ("prefill-0", "decode-0"):
        for url in (doors["router"], doors[name]):
            found = [s for s in scraped(url) if s.name == "vllm:cache_config_info" and s.labels["engine"] == name]
            assert [(s.labels["block_size"], s.labels["num_gpu_blocks"]) for s in found] == [("16", "1024")]


def test_workers_answer_probes(doors):
    for name in ("prefill-0", "decode-0"):
        assert httpx.get(doors[name] + "/health").status_code == 200


# ---------------------------------------------------------------- and it says what happened


def test_one_hand_over_is_told_by_everybody_in_the_same_numbers(cluster, doors):
    before = {name: scraped(url) for name, url in doors.items()}
    with Client(cluster.grpc, timeout_s=60) as client:
        answer = client.generate("def add(a, b):\n" * 40, max_tokens=6, temperature=0, ignore_eos=True)
    assert answer.usage.completion_tokens == 6
    now: dict[str, list[Series]] = {}

    def grown(who: str, name: str, **labels: str) -> float:
        return value(now[who], f"vllm:{name}", **labels) - value(before[who], f"vllm:{name}", **labels)

    end_s = time.monotonic() + 10
    while True:  # engines tell ten times a second
        now.update({name: scraped(url) for name, url in doors.items()})
        steps = {who: grown(who, "iteration_tokens_total_sum") for who in doors}
        ends = {who: grown(who, "request_success_total", finished_reason="length") for who in doors}
        all_told = steps["router"] == steps["prefill-0"] + steps["decode-0"] > answer.usage.prompt_tokens + 4
        if all_told and ends == dict.fromkeys(doors, 1):
            break
        assert time.monotonic() < end_s, (steps, ends)
        time.sleep(0.05)
    prompt = answer.usage.prompt_tokens
    generated = {who: grown(who, "generation_tokens_total") for who in doors}
    assert generated == {"router": 6, "prefill-0": 1, "decode-0": 5}
    assert {who: grown(who, "prompt_tokens_total") for who in doors} == dict.fromkeys(doors, prompt)
    for who in ("router", "decode-0"):
        assert grown(who, "external_prefix_cache_queries_total") == prompt
        assert grown(who, "external_prefix_cache_hits_total") == prompt
    sources = {who: grown(who, "prompt_tokens_by_source_total", source="local_compute") for who in doors}
    assert sources == {"router": 0, "prefill-0": prompt, "decode-0": 0}
    computed = {who: grown(who, "request_prefill_kv_computed_tokens_sum") for who in doors}
    assert computed == {"router": prompt, "prefill-0": prompt, "decode-0": 0}
    for phase in ("queue", "prefill", "decode", "inference"):
        counts = {who: grown(who, f"request_{phase}_time_seconds_count") for who in doors}
        assert counts == dict.fromkeys(doors, 1), phase
    for who in ("router", "decode-0"):  # phases add up, as a request's life does
        spans = [grown(who, f"request_{phase}_time_seconds_sum") for phase in ("prefill", "decode", "inference")]
        assert spans[0] > 0
        assert spans[0] + spans[1] == pytest.approx(spans[2])
        assert grown(who, "request_queue_time_seconds_sum") + spans[2] <= grown(who, "e2e_request_latency_seconds_sum")
    decode_s = grown("decode-0", "request_decode_time_seconds_sum")
    assert grown("decode-0", "inter_token_latency_seconds_sum") == pytest.approx(decode_s)
    assert value(now["router"], "twostroke_handover_transfer_seconds_count") == 1
    moved = value(now["router"], "twostroke_handover_bytes_sum")
    assert moved == value(now["decode-0"], "twostroke_handover_bytes_sum") > 0
