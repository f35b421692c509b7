"""Answers of several routers joined to one: the report of the cluster, and the metrics. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from ...core.board import render

_SEEN_BY_ALL = frozenset({"workers_lost", "prefix_gaps"})  # counts of what every router sees for itself


def joined_report(own: Mapping[str, Any], others: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The report of one router with those of the others.

    routers: {..., workers {worker_id: state}} of each, the own one first. counters: their sums; of what every router
    sees for itself, the largest. prompts: sums over all. All other keys are those of the own report.
    """
    reports = [own, *(report for report in others if _is_report(report))]
    counters = {name: _join(name, [report["counters"].get(name, 0) for report in reports]) for name in own["counters"]}
    prompts = {name: sum(report["prompts"].get(name, 0) for report in reports) for name in own["prompts"]}
    routers = [_router_of(report) for report in reports]
    return {**own, "routers": routers, "counters": counters, "prompts": prompts}


def live_workers(report: Mapping[str, Any]) -> set[str]:
    """Names of the workers that can get work, in the report of one router."""
    return (
        {worker["worker_id"] for worker in report["workers"] if worker["state"] == "live"}
        if _is_report(report)
        else set()
    )


def joined_metrics(texts: Sequence[tuple[str, str]], accept: str) -> tuple[bytes, str]:
    """All metrics of several routers (name, OpenMetrics text), each series with the label `router`.

    Returns body and content type for the Accept header. So a scrape gets the same series whichever router answers it.
    """
    registry = CollectorRegistry()
    registry.register(_Joined(texts))
    return render(registry, accept)


class _Joined(Collector):
    def __init__(self, texts: Sequence[tuple[str, str]]) -> None:
        self._texts = texts

    def collect(self) -> Iterator[Family]:
        families: dict[str, Family] = {}
        for router, text in self._texts:
            for family in text_string_to_metric_families(text):  # type: ignore[no-untyped-call]
                known = families.setdefault(family.name, Family(family.name, family.documentation, family.type))
                for sample in family.samples:
                    known.samples.append(sample._replace(labels={**sample.labels, "router": router}))
        yield from families.values()


def _join(name: str, counts: Sequence[int]) -> int:
    return max(counts) if name in _SEEN_BY_ALL else sum(counts)


def _router_of(report: Mapping[str, Any]) -> dict[str, Any]:
    states = {worker["worker_id"]: worker["state"] for worker in report["workers"]}
    return {**report["router"], "workers": states}


def _is_report(report: Mapping[str, Any]) -> bool:
    """Whether a peer's report has the parts that are used here; one of another release may not."""
    router, workers = report.get("router"), report.get("workers")
    sums = [report.get(name) for name in ("counters", "prompts")]
    if not (isinstance(router, dict) and isinstance(workers, list) and all(isinstance(one, dict) for one in sums)):
        return False
    return {"name", "incarnation"} <= router.keys() and all(
        isinstance(worker, dict) and {"worker_id", "state"} <= worker.keys() for worker in workers
    )
