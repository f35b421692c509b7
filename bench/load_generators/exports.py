"""What each load generator says in its own export, and whether that was expected. Knows no tool and no server."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class UnreadableExport(Exception):
    """The export is missing, or has not what its tool's version writes."""


@dataclass(frozen=True)
class Outcome:
    """One run as its tool tells it. Times in milliseconds; None: the tool does not say, or nothing was streamed."""

    finished: int
    failed: int  # errors, and requests that the tool began and never finished
    output_tokens: int | None = None
    ttft_p50_ms: float | None = None
    itl_p50_ms: float | None = None
    latency_p50_ms: float | None = None
    output_tokens_per_s: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Expected:
    """What an outcome must be for a run to pass."""

    finished: int
    output_tokens: int | None = None  # None: the tool counts in another way
    at_least: bool = False  # the tool begins new requests until it is told to stop, so more may finish
    router_counts_all: bool = True  # False: the tool sends requests, or cuts them off, that it does not count


def verdict(expected: Expected, outcome: Outcome, router: dict[str, int]) -> list[str]:
    """All that is wrong with an outcome. `router`: its own count of requests by how they ended, during the run."""
    wrong = []
    if outcome.failed:
        wrong.append(f"{outcome.failed} requests failed or were not finished")
    if outcome.finished < expected.finished or (outcome.finished > expected.finished and not expected.at_least):
        wrong.append(f"{outcome.finished} requests finished; expected {expected.finished}")
    if expected.output_tokens not in (None, outcome.output_tokens):
        wrong.append(f"{outcome.output_tokens} output tokens; expected {expected.output_tokens}")
    wrong += [f"the router counts {router[bad]} {bad}" for bad in ("rejected", "failed") if router.get(bad)]
    if expected.router_counts_all and router.get("finished") != outcome.finished:
        wrong.append(f"the router counts {router.get('finished')} finished")
    return wrong


Reader = Callable[[Path], Outcome]


def guidellm(folder: Path) -> Outcome:
    """`--output kind=json,path=report.json`, all benchmarks of it: a sweep has several."""
    benchmarks = _load(folder / "report.json")["benchmarks"]
    metrics = [benchmark["metrics"] for benchmark in benchmarks]
    totals = [one["request_totals"] for one in metrics]
    seconds = sum(benchmark["duration"] for benchmark in benchmarks)
    tokens = round(sum(one["output_token_count"]["successful"]["total_sum"] for one in metrics))

    def median(name: str) -> float | None:
        found = [one[name]["successful"]["median"] for one in metrics if one[name]["successful"]["count"]]
        return statistics.median(found) if found else None

    latency_s = median("request_latency")
    return Outcome(
        finished=sum(one["successful"] for one in totals),
        failed=sum(one["errored"] + one["incomplete"] for one in totals),
        output_tokens=tokens,
        ttft_p50_ms=median("time_to_first_token_ms") or None,  # 0: nothing was streamed
        itl_p50_ms=median("inter_token_latency_ms") or None,
        latency_p50_ms=None if latency_s is None else 1e3 * latency_s,
        output_tokens_per_s=tokens / seconds if seconds else None,
        note=f"{len(benchmarks)} loads" if len(benchmarks) > 1 else "",
    )


def aiperf(folder: Path) -> Outcome:
    """`profile_export_aiperf.json`; what it scraped from /metrics stands in `server_metrics_export.json`."""
    told = _load(folder / "profile_export_aiperf.json")
    errors = sum(error["count"] for error in told["error_summary"])
    if told["was_cancelled"] or not told["is_complete"]:
        errors += 1
    scraped = _load(folder / "server_metrics_export.json")
    num_series = len(scraped["metrics"]) if scraped["summary"]["endpoints_successful"] else 0

    def value(name: str, which: str) -> float | None:
        return told[name].get(which) if told.get(name) else None

    return Outcome(
        finished=round(value("request_count", "avg") or 0),
        failed=errors,
        output_tokens=round(value("total_output_tokens", "avg") or 0),
        ttft_p50_ms=value("time_to_first_token", "p50"),
        itl_p50_ms=value("inter_token_latency", "p50"),
        latency_p50_ms=value("request_latency", "p50"),
        output_tokens_per_s=value("output_token_throughput", "avg"),
        note=f"{num_series} metrics read from /metrics",
    )


def lm_eval(folder: Path) -> Outcome:
    """`--output_path` with `--log_samples`: one line for every question, with all that the server answered to it."""
    samples = [json.loads(line) for file in folder.rglob("samples_*.jsonl") for line in file.read_text().splitlines()]
    if not samples:
        raise UnreadableExport(f"no samples_*.jsonl below {folder.name}")
    answers = [answer for sample in samples for answer in sample["resps"]]
    (results,) = [_load(file)["results"] for file in folder.rglob("results_*.json")]
    scores = {
        f"{task} {metric.removesuffix(',none')}": score
        for task, found in results.items()
        for metric, score in found.items()
        if isinstance(score, float) and "stderr" not in metric
    }
    return Outcome(
        finished=sum(bool(answer) and answer[0] not in (None, "") for answer in answers),
        failed=sum(not answer or answer[0] in (None, "") for answer in answers),
        note=", ".join(f"{name} {score:.2f}" for name, score in scores.items()),
    )


def llmeter(folder: Path) -> Outcome:
    """`stats.json` of a run that was saved."""
    (file,) = folder.rglob("stats.json")
    told = _load(file)

    def milliseconds(name: str) -> float | None:
        return None if told.get(name) is None else 1e3 * told[name]

    return Outcome(
        finished=told["total_requests"] - told["failed_requests"],
        failed=told["failed_requests"],
        output_tokens=round(told["total_output_tokens"]),
        ttft_p50_ms=milliseconds("time_to_first_token-p50"),
        latency_p50_ms=milliseconds("time_to_last_token-p50"),
    )


def genai_bench(folder: Path) -> Outcome:
    """One `*_time_*.json` for each concurrency, beside `experiment_metadata.json`."""
    found = [_load(file)["aggregated_metrics"] for file in sorted(folder.rglob("*_time_*.json"))]
    if not found:
        raise UnreadableExport(f"no *_time_*.json below {folder.name}")

    def median(name: str) -> float:
        return 1e3 * statistics.median(one["stats"][name]["p50"] for one in found)

    return Outcome(
        finished=sum(one["num_completed_requests"] for one in found),
        failed=sum(one["num_error_requests"] for one in found),
        ttft_p50_ms=median("ttft"),
        itl_p50_ms=median("tpot"),
        latency_p50_ms=median("e2e_latency"),
        output_tokens_per_s=statistics.median(one["mean_output_throughput_tokens_per_s"] for one in found),
        note=f"{len(found)} loads" if len(found) > 1 else "",
    )


def _load(file: Path) -> dict[str, Any]:
    try:
        told: dict[str, Any] = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UnreadableExport(f"{file.name} cannot be read ({type(error).__name__})") from None
    return told
