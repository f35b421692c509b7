"""Renders templates that nobody vouches for: in bounded time, memory and output. Knows nothing of chats.

jinja2's sandbox keeps a template away from Python's internals, but not from burning the machine. So here every
render has a meter, and everything that can repeat or grow is charged on it before or as it happens:

    loops and macros    each round, with the literal text in it (a tick is put into their bodies)
    + * % and ~         the size of the result, foreseen; powers and text formats with widths are refused
    calls and filters   the size of the result; `replace` and `join`, which multiply, are foreseen
    list, dict, tuple   as large as they are when written out, so that nested copies cannot hide their size
    output              every character

What jinja2 offers and chat templates do not need (text padding, HTML, random values) is left out.
"""

from __future__ import annotations

import functools
import json
import re
import string
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_RANGE = 100_000
MAX_INT_BITS = 4096

_FILTERS = frozenset(
    {
        *("abs", "attr", "batch", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float"),
        *(
            "groupby",
            "indent",
            "int",
            "items",
            "join",
            "last",
            "length",
            "list",
            "lower",
            "map",
            "max",
            "min",
            "reject",
        ),
        *(
            "rejectattr",
            "replace",
            "reverse",
            "round",
            "safe",
            "select",
            "selectattr",
            "slice",
            "sort",
            "string",
            "sum",
        ),
        *("title", "trim", "truncate", "unique", "upper", "wordcount"),
    }
)
_PADDING_METHODS = frozenset({"center", "expandtabs", "format", "format_map", "ljust", "rjust", "translate", "zfill"})
_WIDTH_IN_FORMAT = re.compile(r"%[^%a-zA-Z]*[0-9*]")


@dataclass(frozen=True, slots=True)
class Limits:
    """How much one render may take."""

    max_output_chars: int = 4_000_000
    max_work: int = 40_000_000  # loop rounds, and characters or elements made
    max_seconds: float = 2.0


class LimitExceeded(Exception):
    """A render took more than its limits allow."""


class Meter:
    """What one render may still take."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._work_left = limits.max_work
        self._ends_s = time.monotonic() + limits.max_seconds

    def charge(self, work: int) -> None:
        """Take `work` off what is left."""
        self._work_left -= work
        if self._work_left < 0:
            raise LimitExceeded(f"more than {self._limits.max_work} steps and characters of work")
        if time.monotonic() > self._ends_s:
            raise LimitExceeded(f"more than {self._limits.max_seconds:g} s")

    def charge_size(self, value: Any) -> None:
        """Charge `value` as large as it is written out."""
        waiting = [value]
        while waiting:
            one = waiting.pop()
            if isinstance(one, (str, bytes)):
                self.charge(len(one) + 1)
            elif isinstance(one, (list, tuple, set, frozenset)):
                self.charge(len(one) + 1)
                waiting.extend(one)
            elif isinstance(one, dict):  # its own methods: looking at the size of a message reads nothing of it
                self.charge(len(one) + 1)
                waiting.extend(dict.keys(one))
                waiting.extend(dict.values(one))
            elif isinstance(one, Mapping):
                self.charge(len(one) + 1)
                waiting.extend(one.keys())
                waiting.extend(one.values())
            elif isinstance(one, Namespace):
                waiting.append(_attributes(one))
            else:
                self.charge(1)


def _attributes(namespace: Namespace) -> Any:
    return object.__getattribute__(namespace, "_Namespace__attrs")


class MeteredEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox with a meter. One environment can render in several threads at once."""

    intercepted_binops = frozenset({"+", "*", "%", "**"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
        self._local = threading.local()
        self.filters = {name: self._charged(name, f) for name, f in self.filters.items() if name in _FILTERS}
        self.filters |= {
            "tojson": self._to_json,
            "metered tick": self._tick,  # the space keeps templates from naming them
            "metered size": self._sized,
            "metered concat": self._concatenated,
        }
        self.globals = {
            "range": _bounded_range,
            "dict": _new_dict,
            "namespace": Namespace,
            "cycler": jinja2.utils.Cycler,
            "joiner": jinja2.utils.Joiner,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }
        self.finalize = self._output

    # ------------------------------------------------------------ the public side

    def compile_metered(self, source: str, limits: Limits) -> jinja2.Template:
        """A template whose renders are metered; use `render_metered`."""
        with self._metered(limits):
            tree = self.parse(source)
            _put_meters(tree)
            return jinja2.Template.from_code(self, self.compile(tree), self.make_globals(None))

    def render_metered(self, template: jinja2.Template, limits: Limits, variables: Mapping[str, Any]) -> str:
        """The template's output.

        Raises:
            LimitExceeded: it takes more than `limits`.
            jinja2.TemplateError, and whatever else a wrong template raises.
        """
        parts: list[str] = []
        num_chars = 0
        with self._metered(limits):
            for part in template.generate(**variables):
                num_chars += len(part)
                if num_chars > limits.max_output_chars:
                    raise LimitExceeded(f"more than {limits.max_output_chars} characters of output")
                parts.append(part)
        return "".join(parts)

    @contextmanager
    def _metered(self, limits: Limits) -> Iterator[None]:
        self._local.meter = Meter(limits)
        try:
            yield
        finally:
            del self._local.meter

    @property
    def _meter(self) -> Meter:
        meter: Meter = self._local.meter
        return meter

    # ------------------------------------------------------------ what is charged

    def call(self, context: Context, obj: Any, *args: Any, **kwargs: Any) -> Any:
        """A call in a template."""
        owner = getattr(obj, "__self__", None)
        if isinstance(owner, str):
            self._foresee(obj.__name__, owner, args)
        self._meter.charge(1)
        result = super().call(context, obj, *args, **kwargs)
        self._meter.charge_size(result)
        return result

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """An operator whose result can be larger than its operands."""
        if operator == "**":
            raise jinja2.exceptions.SecurityError("powers are not allowed in a template")
        if operator == "*":
            self._foresee_product(left, right)
        elif operator == "%" and isinstance(left, str) and _WIDTH_IN_FORMAT.search(left):
            raise jinja2.exceptions.SecurityError("text formats with a width are not allowed in a template")
        else:
            self._meter.charge_size((left, right))
        return super().call_binop(context, operator, left, right)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Whether a template may use the attribute."""
        if isinstance(obj, (str, bytes)) and attr in _PADDING_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`str.format` with bare fields; one that could pad or look into its arguments is refused."""
        owner = getattr(value, "__self__", None)
        if not isinstance(owner, str) or getattr(value, "__name__", "") != "format":
            return None

        def formatted(*args: Any, **kwargs: Any) -> str:
            for _, name, width, conversion in string.Formatter().parse(owner):
                if name is None:
                    continue
                if width or conversion or not (name == "" or name.isidentifier() or name.isdecimal()):
                    raise jinja2.exceptions.SecurityError("text formats must have bare fields, like {} or {name}")
                self._meter.charge_size((args, kwargs))
            return owner.format(*args, **kwargs)

        return formatted

    def _foresee(self, name: str, owner: str, args: tuple[Any, ...]) -> None:
        if name == "replace" and len(args) >= 2 and isinstance(args[0], str) and isinstance(args[1], str):
            self._meter.charge(len(owner) + owner.count(args[0]) * len(args[1]))
        elif name == "join" and args:
            self._meter.charge_size(args[0])
            if hasattr(args[0], "__len__"):
                self._meter.charge(len(args[0]) * len(owner))

    def _foresee_product(self, left: Any, right: Any) -> None:
        for sequence, count in ((left, right), (right, left)):
            if isinstance(sequence, (str, bytes, list, tuple)) and isinstance(count, int):
                one = Meter(Limits(max_work=self._meter._work_left))
                one.charge_size(sequence)
                self._meter.charge((self._meter._work_left - one._work_left) * max(1, count))
                return
        if isinstance(left, int) and isinstance(right, int) and left.bit_length() + right.bit_length() > MAX_INT_BITS:
            raise LimitExceeded(f"an integer of more than {MAX_INT_BITS} bits")

    def _charged(self, name: str, filter_: Callable[..., Any]) -> Callable[..., Any]:
        # jinja2 passes environment or context first where the filter is marked so; the marks travel with `wraps`.
        leading = 1 if getattr(filter_, "jinja_pass_arg", None) is not None else 0

        @functools.wraps(filter_)
        def charged(*args: Any, **kwargs: Any) -> Any:
            values = args[leading:]
            if name == "replace" and values:
                self._foresee("replace", str(values[0]), tuple(map(str, values[1:3])) + tuple(kwargs.values()))
            elif name == "join" and values:
                if not hasattr(values[0], "__len__"):  # a generator
                    values = (list(values[0]), *values[1:])
                separator = values[1] if len(values) > 1 else kwargs.get("d", "")
                self._foresee("join", str(separator), (values[0],))
            elif name in ("indent", "truncate", "batch", "slice", "string"):
                self._check_sizes(name, values, kwargs)
            result = filter_(*args[:leading], *values, **kwargs)
            self._meter.charge_size(result)
            return result

        return charged

    def _check_sizes(self, name: str, values: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._meter.charge_size(values[0])
        extent = 1
        for value in (*values[1:], *kwargs.values()):
            extent = max(extent, value if isinstance(value, int) else len(value) if isinstance(value, str) else 1)
        if name == "indent":
            extent *= str(values[0]).count("\n") + 1
        self._meter.charge(extent)

    def _to_json(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        if indent is not None and not (isinstance(indent, int) and 0 <= indent <= 16):
            raise jinja2.exceptions.SecurityError(f"tojson(indent={indent!r}); must be a number from 0 to 16")
        self._meter.charge_size(value)
        text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        self._meter.charge(len(text))
        return text

    def _output(self, value: Any) -> Any:
        self._meter.charge_size(value)
        return value

    @staticmethod
    @jinja2.pass_context
    def _tick(context: Context, work: int) -> None:
        environment = context.environment
        assert isinstance(environment, MeteredEnvironment)
        environment._meter.charge(work)

    def _sized(self, value: Any) -> Any:
        self._meter.charge_size(value)
        return value

    def _concatenated(self, values: list[Any]) -> str:
        self._meter.charge_size(values)
        return "".join(map(str, values))


# ---------------------------------------------------------------- meters in the tree


def _put_meters(tree: nodes.Template) -> None:
    """Put a tick into every body that can run again, and a size on everything that can be nested.

    A quarter for literal text: most of it stands in branches that a round does not take.
    """
    for body_of in tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
        tick = _filter(nodes.Const(1 + _literal_chars(body_of) // 4), "metered tick")
        body: list[nodes.Node] = body_of.body  # type: ignore[attr-defined]  # all three kinds have one
        body.insert(0, nodes.ExprStmt(tick, lineno=body_of.lineno))
    _wrap_sized(tree)


def _literal_chars(body_of: nodes.Node) -> int:
    return sum(len(data.data) for data in body_of.find_all(nodes.TemplateData))


def _wrap_sized(node: nodes.Node) -> None:
    for field, value in node.iter_fields():
        if isinstance(value, nodes.Node):
            setattr(node, field, _wrapped(value))
        elif isinstance(value, list):
            value[:] = [_wrapped(one) if isinstance(one, nodes.Node) else one for one in value]


def _wrapped(node: nodes.Node) -> nodes.Node:
    _wrap_sized(node)
    if isinstance(node, nodes.Concat):
        return _filter(nodes.List(node.nodes, lineno=node.lineno), "metered concat")
    if isinstance(node, (nodes.List, nodes.Dict)) or (isinstance(node, nodes.Tuple) and node.ctx == "load"):
        return _filter(node, "metered size")
    return node


def _filter(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno or 1)


# ---------------------------------------------------------------- what templates may call


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks what a model writes, for training; here it is just its content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The content."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _new_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)  # the type itself has more to offer than its making


def _bounded_range(*args: int) -> range:
    found = range(*args)
    if len(found) > MAX_RANGE:
        raise LimitExceeded(f"a range of more than {MAX_RANGE} numbers")
    return found


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format_: str) -> str:
    if len(format_) > 100 or re.search(r"%[^a-zA-Z%]*[0-9]", format_):
        raise jinja2.exceptions.SecurityError("strftime_now takes a short format without widths")
    return datetime.now().strftime(format_)
