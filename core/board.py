"""Collector that exposes a table of metrics to Prometheus. Knows neither the metrics' meaning nor requests.

Values are plain numbers. One event loop changes them, and scrapes run on the same loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from .tally import Spread, Tally


class Kind(Enum):
    """Type of a metric, as Prometheus names it."""

    COUNTER = auto()
    GAUGE = auto()
    HISTOGRAM = auto()


@dataclass(frozen=True, slots=True)
class Metric:
    """Definition of one metric. The name has none of the suffixes `_total`, `_bucket`, `_sum`, `_count`."""

    name: str
    kind: Kind
    help: str
    bounds: tuple[float, ...] = ()  # histograms only: upper bounds, ascending
    labels: tuple[str, ...] = ()  # own labels, after those of all metrics of the board


class Board(Collector):
    """Values of metrics, by label values. All metrics of one board share the leading labels."""

    def __init__(
        self, registry: CollectorRegistry, labels: tuple[str, ...], refresh: Callable[[], None] | None = None
    ) -> None:
        """`refresh` is called before every scrape, for values that are counted elsewhere."""
        self._labels = labels
        self._refresh = refresh
        self._numbers: dict[Metric, dict[tuple[str, ...], float]] = {}
        self._histograms: dict[Metric, dict[tuple[str, ...], Tally | Spread]] = {}
        registry.register(self)

    def know(self, metrics: Iterable[Metric], *labels: str) -> None:
        """Create series with the value zero, before anything is counted."""
        for metric in metrics:
            if metric.kind is Kind.HISTOGRAM:
                self._tally(metric, labels)
            else:
                self._numbers.setdefault(metric, {}).setdefault(labels, 0.0)

    def add(self, metric: Metric, *labels: str, amount: float = 1.0) -> None:
        """Add to a counter."""
        series = self._numbers.setdefault(metric, {})
        series[labels] = series.get(labels, 0.0) + amount

    def set(self, metric: Metric, *labels: str, value: float) -> None:
        """Set a gauge, or a counter that is counted elsewhere."""
        self._numbers.setdefault(metric, {})[labels] = value

    def observe(self, metric: Metric, *labels: str, value: float) -> None:
        """Add a value to a histogram."""
        self._tally(metric, labels).add(value)

    def put(self, metric: Metric, *labels: str, spread: Spread) -> None:
        """Set the counts of a histogram that is counted elsewhere, with the metric's bounds."""
        self._histograms.setdefault(metric, {})[labels] = spread

    def forget(self, metric: Metric, *labels: str) -> None:
        """Drop every series of a metric whose label values begin with these."""
        for series in (self._numbers.get(metric), self._histograms.get(metric)):
            for key in [key for key in series or () if key[: len(labels)] == labels]:
                del series[key]  # type: ignore[union-attr]

    def collect(self) -> Iterator[Family]:
        """Yield all metric families, for the encoders of the text formats."""
        if self._refresh is not None:
            self._refresh()
        for metric, series in self._numbers.items():
            kind = CounterMetricFamily if metric.kind is Kind.COUNTER else GaugeMetricFamily
            family = kind(metric.name, metric.help, labels=[*self._labels, *metric.labels])
            for labels, value in series.items():
                family.add_metric(labels, value)
            yield family
        for metric, histograms in self._histograms.items():
            histogram = HistogramMetricFamily(metric.name, metric.help, labels=[*self._labels, *metric.labels])
            for labels, counted in histograms.items():
                spread = counted.spread if isinstance(counted, Tally) else counted
                histogram.add_metric(labels, _cumulative(metric.bounds, spread.counts), spread.total)
            yield histogram

    def _tally(self, metric: Metric, labels: tuple[str, ...]) -> Tally:
        series = self._histograms.setdefault(metric, {})
        tally = series.get(labels)
        if tally is None:
            tally = series[labels] = Tally(metric.bounds)
        assert isinstance(tally, Tally), f"{metric.name} is counted elsewhere"
        return tally


def render(registry: CollectorRegistry, accept: str) -> tuple[bytes, str]:
    """Encode all metrics of a registry: as OpenMetrics if the Accept header names it, else as Prometheus text.

    Returns the body and its content type. The header's escaping parameter is ignored: without one, the library's own
    negotiation would replace the colon in the name of each of vLLM's metrics.
    """
    if "application/openmetrics-text" in accept:
        return openmetrics.generate_latest(registry, escaping=openmetrics.ALLOWUTF8), openmetrics.CONTENT_TYPE_LATEST  # type: ignore[no-untyped-call]
    return generate_latest(registry), "text/plain; version=0.0.4; charset=utf-8"


def _cumulative(bounds: Sequence[float], counts: Sequence[int]) -> list[tuple[str, float]]:
    buckets, below = [], 0
    for bound, count in zip((*bounds, float("inf")), counts, strict=True):
        below += count
        buckets.append((floatToGoString(bound), float(below)))  # type: ignore[no-untyped-call]
    return buckets
