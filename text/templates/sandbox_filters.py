"""Filters and tests that templates may use, and the charge of each before it is applied.

A filter or test that is not listed here is refused, also those of later jinja2 releases. Filters that read a whole
iterable get it as a container whose elements are charged; filters that yield elements one by one are charged for each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from jinja2.exceptions import SecurityError
from jinja2.runtime import Undefined

from .charges import ELEMENT, Meter, checked
from .sandbox_methods import ESCAPE_GROWTH, charge_join, charge_recase, charge_replace, charge_strip, split_lines

MAX_PRECISION = 20
MAX_ATTRIBUTE_CHARS = 256
MAX_NUMBER_CHARS = 1000  # the filters `int` and `float` treat longer text as no number

Rule = Callable[..., Any]  # (meter, value, *args, **kwargs) -> value to use instead; None: the value itself


def _no_work(_meter: Meter, _value: Any, *_args: Any, **_kwargs: Any) -> None:
    return None


def _name(meter: Meter, _value: Any, name: Any) -> None:
    _check_attribute(name)


def _text(growth: int) -> Rule:
    def rule(meter: Meter, value: Any, *_args: Any, **_kwargs: Any) -> None:
        meter.charge_written(value, growth)

    return rule


def _written(meter: Meter, value: Any) -> str:
    if not isinstance(value, str):
        meter.charge_written(value)
    return str(value)


def _recase(meter: Meter, value: Any) -> None:
    charge_recase(meter, _written(meter, value))


def _trim(meter: Meter, value: Any, chars: Any = None) -> None:
    charge_strip(meter, _written(meter, value), chars)


def _replace(meter: Meter, value: Any, old: Any, new: Any, count: Any = None) -> None:
    charge_replace(meter, _written(meter, value), _written(meter, old), _written(meter, new))


def _indent(meter: Meter, value: Any, width: Any = 4, first: Any = False, blank: Any = False) -> None:
    text = _written(meter, value)
    split_lines(meter, text)
    num_chars = len(width) if isinstance(width, str) else max(0, int(width))
    meter.charge((len(text.splitlines()) + 2) * num_chars)  # jinja2 builds the indent even for values that are no text


def _truncate(meter: Meter, value: Any, length: Any = 255, killwords: Any = False, end: Any = "...", *_: Any) -> None:
    meter.charge_size((value, end))


def _number(meter: Meter, value: Any, default: Any = 0, base: Any = 10) -> Any:
    return "" if isinstance(value, str) and len(value) > MAX_NUMBER_CHARS else None


def _numeric(_meter: Meter, value: Any, *_args: Any, **_kwargs: Any) -> None:
    if not isinstance(value, (int, float, Undefined)):
        raise SecurityError(f"a number is needed, not a {type(value).__name__}")
    checked(value)


def _round(meter: Meter, value: Any, precision: Any = 0, method: Any = "common") -> None:
    _numeric(meter, value)
    if not isinstance(precision, int) or abs(precision) > MAX_PRECISION:
        raise SecurityError(f"round({precision!r:.40}); must be a number of digits, at most {MAX_PRECISION}")


def _items(meter: Meter, value: Any, *args: Any, **kwargs: Any) -> Any:
    dots = max(_check_attribute(name) for name in (*args, kwargs.get("attribute")))
    values = meter.taken(value)
    meter.charge(ELEMENT * dots * len(values))
    return values


def _sum(meter: Meter, value: Any, attribute: Any = None, start: Any = 0) -> Any:
    _numeric(meter, start)
    return _items(meter, value, attribute=attribute)


def _joined(meter: Meter, value: Any, d: Any = "", attribute: Any = None) -> Any:
    meter.charge_written(d)
    (values,) = charge_join(meter, str(d), _items(meter, value, attribute=attribute))
    if not all(isinstance(one, str) for one in values):
        meter.charge_written(values)
    return values


def _sorted(meter: Meter, value: Any, *args: Any, **kwargs: Any) -> Any:
    values = _items(meter, value, *args, **kwargs)
    _charge_sort(meter, values)
    return values


def _grouped(meter: Meter, value: Any, attribute: Any, *_args: Any, **_kwargs: Any) -> Any:
    return _sorted(meter, value, attribute=attribute)


def _dictsort(meter: Meter, value: Any, *_args: Any, **_kwargs: Any) -> None:
    if isinstance(value, Mapping):
        _charge_sort(meter, value)
        meter.charge(2 * ELEMENT * len(value))


def _charge_sort(meter: Meter, values: Any) -> None:
    meter.charge(meter.charge_size(values) * len(values).bit_length())


def _filled(meter: Meter, value: Any, count: Any, fill_with: Any = None) -> Any:
    if not isinstance(count, int):
        raise SecurityError(f"a number of elements is needed, not a {type(count).__name__}")
    values = meter.taken(value)
    meter.charge(max(0, count) * (ELEMENT + meter.charge_size(fill_with)))
    return values


def _each(meter: Meter, value: Any, *args: Any, **kwargs: Any) -> Any:
    dots = max((_check_attribute(name) for name in (*args[:1], kwargs.get("attribute"))), default=0)
    return meter.ticking(value, ELEMENT * (1 + dots)) if value else None


def _reversed(meter: Meter, value: Any) -> Any:
    if isinstance(value, str):
        meter.charge(ELEMENT + len(value))
        return None
    return None if hasattr(value, "__reversed__") or hasattr(value, "__getitem__") else meter.taken(value)


def _check_attribute(name: Any) -> int:
    """Number of dots and commas in an attribute's name: each part is looked up for every element."""
    if isinstance(name, str):
        if len(name) > MAX_ATTRIBUTE_CHARS:
            raise SecurityError(f"an attribute's name of {len(name)} characters; at most {MAX_ATTRIBUTE_CHARS}")
        return name.count(".") + name.count(",")
    if name is not None and not isinstance(name, (int, Undefined)):
        raise SecurityError(f"an attribute's name cannot be a {type(name).__name__}")
    return 0


def _both(meter: Meter, value: Any, *others: Any) -> None:
    meter.charge_size(value)
    meter.charge_size(others)


def _divided(meter: Meter, value: Any, *others: Any) -> None:
    for number in (value, *others):
        _numeric(meter, number)


FILTERS: dict[str, Rule] = {
    **dict.fromkeys(("count", "length", "d", "default", "first", "last", "items"), _no_work),
    **dict.fromkeys(("lower", "upper", "capitalize"), _recase),
    **dict.fromkeys(("title", "wordcount"), _text(ELEMENT)),
    **dict.fromkeys(("e", "escape"), _text(ESCAPE_GROWTH)),
    **dict.fromkeys(("string", "safe"), _text(1)),
    **dict.fromkeys(("list", "min", "max", "unique"), _items),
    **dict.fromkeys(("map", "select", "reject", "selectattr", "rejectattr"), _each),
    **dict.fromkeys(("batch", "slice"), _filled),
    **dict.fromkeys(("int", "float"), _number),
    "abs": _numeric,
    "attr": _name,
    "dictsort": _dictsort,
    "groupby": _grouped,
    "indent": _indent,
    "join": _joined,
    "replace": _replace,
    "reverse": _reversed,
    "round": _round,
    "sort": _sorted,
    "sum": _sum,
    "trim": _trim,
    "truncate": _truncate,
}
_CHARGED_BEFORE = frozenset(
    {"attr", "safe", "string", "list", "sort", "min", "max", "trim", "lower", "upper", "capitalize"}
)
TESTS: dict[str, Rule] = {
    **dict.fromkeys(("boolean", "callable", "defined", "undefined", "none", "false", "true", "float"), _no_work),
    **dict.fromkeys(("integer", "number", "string", "mapping", "sequence", "iterable", "escaped", "sameas"), _no_work),
    **dict.fromkeys(("==", "eq", "equalto", "!=", "ne", ">", "gt", "greaterthan", ">=", "ge"), _both),
    **dict.fromkeys(("<", "lt", "lessthan", "<=", "le", "in", "filter", "test"), _both),
    **dict.fromkeys(("lower", "upper"), _text(1)),
    **dict.fromkeys(("odd", "even", "divisibleby"), _divided),
}


def all_charged(meter: Callable[[], Meter], functions: Mapping[str, Any], rules: Mapping[str, Rule]) -> dict[str, Any]:
    """Wrap those of jinja2's filters or tests that have a rule."""
    return {name: _charged(meter, name, functions[name], rule) for name, rule in rules.items() if name in functions}


def _charged(meter: Callable[[], Meter], name: str, function: Callable[..., Any], rule: Rule) -> Callable[..., Any]:
    """Wrap a filter or test: `rule` charges it before the call; the result is charged after it if it can be larger."""
    if rule is _no_work:
        return function
    # jinja2 passes environment or context first to marked functions; `wraps` copies the marks.
    leading = 1 if getattr(function, "jinja_pass_arg", None) is not None else 0

    @functools.wraps(function)
    def apply(*args: Any, **kwargs: Any) -> Any:
        value, *rest = args[leading:]
        instead = rule(meter(), value, *rest, **kwargs)
        result = function(*args[:leading], value if instead is None else instead, *rest, **kwargs)
        if name not in _CHARGED_BEFORE:
            meter().charge_size(checked(result))
        return result

    return apply
