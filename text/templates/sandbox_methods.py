"""Attributes and methods that templates may use, and the charge of each call before it is made.

All others are refused: text padding (`center`, `zfill`), encodings, all methods of numbers, and all that later Python
releases add. The time of a search from the end and of a strip is the product of both texts' lengths, so the pattern has
at most MAX_PATTERN characters there. Searches from the start are linear in CPython ≥ 3.10.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import BuiltinMethodType, MethodType
from typing import Any

from jinja2.runtime import BlockReference, LoopContext, Macro
from jinja2.utils import Namespace
from markupsafe import Markup

from .charges import ELEMENT, LimitExceeded, Meter

MAX_PATTERN = 32
ESCAPE_GROWTH = 5  # "&" becomes "&amp;"

Charge = Callable[..., "tuple[Any, ...] | None"]  # (meter, owner, *args, **kwargs) -> replaced arguments, or None


def _pass(meter: Meter, owner: str, *args: Any, **_kwargs: Any) -> None:
    meter.charge(ELEMENT + len(owner))
    meter.foresee(len(owner) * search_weight(meter.charge_size(args) - 2 * ELEMENT))


def _compare_ends(meter: Meter, _owner: str, *args: Any) -> None:
    meter.charge_size(args)


def search_weight(pattern_chars: int) -> int:
    """Time per character of a search for a pattern of this length, relative to one pass over the text."""
    return 1 if pattern_chars <= MAX_PATTERN else 4


def charge_recase(meter: Meter, owner: str) -> None:
    """Charge a change of letter case."""
    if not owner.isascii():
        meter.foresee(8 * len(owner))  # it is slow, and some letters become three
    meter.charge(ELEMENT + len(owner))


def charge_strip(meter: Meter, owner: str, chars: Any = None) -> None:
    """Charge a strip of `owner`."""
    meter.charge(ELEMENT + len(owner) * _pattern_chars("strip", chars))


def _search_back(meter: Meter, owner: str, sub: Any = None, *_range: Any) -> None:
    meter.charge(ELEMENT + len(owner) * _pattern_chars("a search from the end", sub))


def _split(meter: Meter, owner: str, sep: Any = None, maxsplit: Any = -1) -> None:
    if isinstance(sep, str) and sep:
        meter.charge(len(owner) + len(sep))
        meter.charge(ELEMENT * (2 + owner.count(sep)))
    else:
        split_lines(meter, owner)


def split_lines(meter: Meter, owner: str, *_keepends: Any, **_kwargs: Any) -> None:
    """Charge a split of `owner` at white space; at most every second character begins a part."""
    meter.charge(2 * ELEMENT + len(owner) * (ELEMENT // 2 + 1))


def _split_back(meter: Meter, owner: str, sep: Any = None, maxsplit: Any = -1) -> None:
    _search_back(meter, owner, sep)
    _split(meter, owner, sep)


def charge_replace(meter: Meter, owner: str, old: Any, new: Any, _count: Any = -1, **_kwargs: Any) -> None:
    """Charge a replacement in `owner`."""
    if isinstance(old, str) and isinstance(new, str):
        meter.charge(ELEMENT + len(owner) + len(old))
        meter.charge(owner.count(old) * len(new) * _growth(owner))


def charge_join(meter: Meter, separator: str, values: Any) -> tuple[Any]:
    """Charge a join of `values`. Reads all of them, and returns them in a container."""
    values = meter.taken(values)
    meter.charge(len(values) * len(separator))
    if _growth(separator) > 1:
        meter.charge(meter.charge_size(values) * ESCAPE_GROWTH)
    return (values,)


def _growth(owner: str) -> int:
    return ESCAPE_GROWTH if isinstance(owner, Markup) else 1


def _pattern_chars(what: str, pattern: Any) -> int:
    if not isinstance(pattern, str):
        return 1
    if len(pattern) > MAX_PATTERN:
        raise LimitExceeded(f"{what} with {len(pattern)} characters; at most {MAX_PATTERN}")
    return max(1, len(pattern))


def _compare(meter: Meter, owner: Any, *args: Any) -> None:
    meter.charge_size(owner)
    meter.charge_size(args)


def _copy(meter: Meter, owner: Any) -> None:
    meter.charge(ELEMENT * (1 + 2 * len(owner)))


def _look_up(meter: Meter, _owner: Any, *args: Any, **_kwargs: Any) -> None:
    if args and type(args[0]) is not str:  # a text caches its hash
        meter.charge_size(args)
    meter.charge(ELEMENT)


def _small(meter: Meter, *_args: Any) -> None:
    meter.charge(ELEMENT)


STR_METHODS: dict[str, Charge] = {
    **dict.fromkeys(("startswith", "endswith"), _compare_ends),
    **dict.fromkeys(("find", "index", "count", "partition"), _pass),
    **dict.fromkeys(("removeprefix", "removesuffix", "isalnum", "isalpha", "isascii", "isdecimal", "isdigit"), _pass),
    **dict.fromkeys(("isidentifier", "islower", "isnumeric", "isprintable", "isspace", "istitle", "isupper"), _pass),
    **dict.fromkeys(("lower", "upper", "title", "capitalize", "swapcase", "casefold"), charge_recase),
    **dict.fromkeys(("strip", "lstrip", "rstrip"), charge_strip),
    **dict.fromkeys(("rfind", "rindex", "rpartition"), _search_back),
    "split": _split,
    "rsplit": _split_back,
    "splitlines": split_lines,
    "replace": charge_replace,
    "join": charge_join,
}
LIST_METHODS: dict[str, Charge] = {"count": _compare, "index": _compare}
DICT_METHODS: dict[str, Charge] = {
    "get": _look_up,
    "keys": _small,
    "values": _small,
    "items": _small,
    "copy": _copy,
}
_LOOP_METHODS: dict[str, Charge] = {"cycle": _compare, "changed": _compare}
_LOOP_FIELDS = ("index", "index0", "revindex", "revindex0", "first", "last", "length", "depth", "depth0")
_METHODS: tuple[tuple[type, dict[str, Charge]], ...] = (
    (str, STR_METHODS),
    (Mapping, DICT_METHODS),
    (list, {**LIST_METHODS, "copy": _copy}),
    (tuple, LIST_METHODS),
    (LoopContext, _LOOP_METHODS),
)
_FIELDS: tuple[tuple[type, frozenset[str]], ...] = (
    (tuple, frozenset({"grouper", "list"})),  # groups of the filter groupby
    (LoopContext, frozenset({*_LOOP_FIELDS, "previtem", "nextitem"})),
    (Macro, frozenset({"name", "arguments", "catch_kwargs", "catch_varargs", "caller"})),
    (BlockReference, frozenset({"super"})),
)

_JINJA_ARGUMENTS = ("_loop_vars", "_block_vars")  # jinja2 adds these to calls in loops and blocks


def is_allowed(value: Any, attribute: str) -> bool:
    """Return whether a template may use this attribute of `value`."""
    if isinstance(value, Namespace):
        return True  # it holds only values of the template
    return any(attribute in methods for kind, methods in _METHODS if isinstance(value, kind)) or any(
        attribute in fields for kind, fields in _FIELDS if isinstance(value, kind)
    )


def charge_call(meter: Meter, method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
    """Charge a call of a listed method of a built-in value. Returns its arguments. None: it is no such method.

    Raises:
        LimitExceeded: the call would exceed the remaining work.
    """
    if not isinstance(method, (BuiltinMethodType, MethodType)):
        return None
    owner = method.__self__
    for kind, methods in _METHODS:
        if isinstance(owner, kind):
            charge = methods.get(method.__name__)
            own = {name: value for name, value in kwargs.items() if name not in _JINJA_ARGUMENTS} if kwargs else kwargs
            return None if charge is None else charge(meter, owner, *args, **own) or args
    return None
