"""What a PromQL query selects, and whether a scrape has it. Just enough of the language for dashboards' queries."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from prometheus_client.parser import text_string_to_metric_families

GIVEN_BY_PROMETHEUS = {"job", "instance", "namespace", "pod"}  # labels of the target, which no exporter has
_GROUPING = re.compile(r"\b(?:by|without|on|ignoring)\s*\(([^)]*)\)")
_SELECTOR = re.compile(r"(?P<name>[a-zA-Z_:][\w:]*)?(?:\{(?P<matchers>[^}]*)\})?(?P<call>\s*\()?")
_MATCHER = re.compile(r"""(?P<label>\w+)\s*(?P<op>=~|!~|!=|=)\s*(?P<quote>["'])(?P<value>.*?)(?P=quote)""")
_WORDS = {"and", "or", "unless", "bool", "by", "without", "on", "ignoring", "group_left", "group_right", "offset"}


class Series(NamedTuple):
    """One line of a scrape."""

    name: str
    labels: dict[str, str]
    value: float


class Selector(NamedTuple):
    """One set of series that a query reads."""

    name: str  # empty: by matchers only
    matchers: tuple[tuple[str, str, str], ...]  # label, operator, value

    def finds(self, series: Series) -> bool:
        """As Prometheus matches: an absent label is an empty one; expressions match whole values."""
        labels = series.labels | {"__name__": series.name}
        return self.name in ("", series.name) and all(
            _holds(labels.get(label, ""), op, value)
            for label, op, value in self.matchers
            if label not in GIVEN_BY_PROMETHEUS
        )


def selectors(query: str) -> Iterator[Selector]:
    """Every selector of a query, in order."""
    for found in _SELECTOR.finditer(_GROUPING.sub(" ", re.sub(r"\[[^]]*\]", " ", query))):
        name, matchers = found["name"] or "", found["matchers"]
        is_selector = (name or matchers) and not found["call"] and name not in _WORDS
        if is_selector:
            matched = _MATCHER.finditer(matchers or "")
            yield Selector(name, tuple((m["label"], m["op"], m["value"]) for m in matched))


def groupings(query: str) -> set[str]:
    """Labels that a query sums or joins by."""
    words = [word.strip() for labels in _GROUPING.findall(query) for word in labels.split(",")]
    return {word for word in words if word} - GIVEN_BY_PROMETHEUS


def scrape(text: str) -> list[Series]:
    """The series of a scrape in Prometheus' text format."""
    families = text_string_to_metric_families(text)
    return [Series(s.name, s.labels, s.value) for family in families for s in family.samples]


def unanswered(query: str, scraped: Iterable[Series]) -> list[str]:
    """Names in a query that find no series, or none with a label that the query groups by."""
    series, missing = list(scraped), []
    for selector in selectors(query):
        found = [one for one in series if selector.finds(one)]
        if not found:
            missing.append(selector.name or str(selector.matchers))
        missing += [
            f"{selector.name} by {label}" for label in groupings(query) if found and label not in found[0].labels
        ]
    return missing


def _holds(have: str, op: str, value: str) -> bool:
    if op in ("=", "!="):
        return (have == value) is (op == "=")
    return (re.fullmatch(value, have) is not None) is (op == "=~")
