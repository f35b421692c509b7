"""Renders templates that nobody vouches for: in bounded time, memory and output. Knows nothing of chats.

jinja2's sandbox keeps a template away from Python's internals, but not from burning the machine. So here every
render has a meter (charges.py), and everything that can repeat or grow is charged on it before it happens, by the
sizes of its operands:

    loops and macros    each round, with the literal text in it
    operators           the size of the result; integers have at most 64 bits; slices, `in` and `==` are charged, too
    methods             as sandbox_methods.py says; a method that it does not name is refused
    filters and tests   as sandbox_filters.py says; likewise
    list, dict, tuple   as large as they are when written out, so that nested copies cannot hide their size
    output              every character

Nothing is evaluated when a template is compiled. One operation holds the interpreter's lock for at most
`Limits.max_step` units of work, some 10 to 100 ms; between operations the clock is looked at.
"""

from __future__ import annotations

import re
import string
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from .charges import ELEMENT, WRITTEN_GROWTH, LimitExceeded, Limits, Meter, checked
from .sandbox_filters import FILTERS, TESTS, all_charged
from .sandbox_json import to_json
from .sandbox_methods import charge_call, is_allowed
from .sandbox_operators import charge_operator
from .sandbox_tree import CONCAT, HOLDER, SIZE, SLICE, TICK, put_meters

__all__ = ["LimitExceeded", "Limits", "MeteredEnvironment"]

MAX_RANGE = 100_000


class MeteredEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox with a meter. One environment can render in several threads at once."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self) -> None:
        # Optimizing would fold constants: it evaluates what no meter sees.
        super().__init__(trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[loopcontrols, _Generation])
        self._local = threading.local()
        self.filters = all_charged(self._current, self.filters, FILTERS)
        self.filters |= {
            "tojson": self._to_json,
            TICK: self._tick,
            SIZE: self._sized,
            CONCAT: self._concatenated,
            SLICE: self._sliced,
            HOLDER: self._holder,
        }
        self.tests = all_charged(self._current, self.tests, TESTS)
        self.globals = {
            "range": self._range,
            "dict": self._new_dict,
            "namespace": self._namespace,
            "joiner": jinja2.utils.Joiner,
            "raise_exception": self._raise_exception,
            "strftime_now": _strftime_now,
        }
        self.finalize = self._output

    # ------------------------------------------------------------ the public side

    def compile_metered(self, source: str) -> jinja2.Template:
        """A template whose renders are metered; use `render_metered`.

        Raises:
            jinja2.TemplateSyntaxError: the source is wrong, or larger than any chat template.
            RecursionError, MemoryError, SyntaxError, ValueError: it nests too deeply.
        """
        tree = self.parse(source)
        put_meters(tree)
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

    def _current(self) -> Meter:
        meter: Meter = self._local.meter
        return meter

    # ------------------------------------------------------------ what jinja2 asks the sandbox

    def call(self, context: Context, obj: Any, *args: Any, **kwargs: Any) -> Any:
        """A call in a template."""
        meter = self._current()
        instead = charge_call(meter, obj, args, kwargs)
        if instead is not None:
            return super().call(context, obj, *instead, **kwargs)
        if isinstance(obj, Macro) and (obj.catch_varargs or obj.catch_kwargs):  # it makes containers of them
            meter.charge_size((args, kwargs))
        meter.charge(ELEMENT)
        result = super().call(context, obj, *args, **kwargs)
        meter.charge(len(result) if isinstance(result, str) else 1)
        return result

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """An operator."""
        if operator == "+" and type(left) is str and type(right) is str:
            self._current().charge(ELEMENT + len(left) + len(right))
            return left + right
        charge_operator(self._current(), operator, left, right)
        return checked(super().call_binop(context, operator, left, right))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Whether a template may use the attribute."""
        return is_allowed(obj, attr) and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`str.format` with bare fields; one that could pad or look into its arguments is refused."""
        owner = getattr(value, "__self__", None)
        if not isinstance(owner, str) or getattr(value, "__name__", "") != "format":
            return None

        def formatted(*args: Any, **kwargs: Any) -> str:
            meter = self._current()
            meter.charge(ELEMENT + len(owner))
            for _, name, width, conversion in string.Formatter().parse(owner):
                if name is None:
                    continue
                if width or conversion or not (name == "" or name.isidentifier() or name.isdecimal()):
                    raise SecurityError("text formats must have bare fields, like {} or {name}")
                meter.charge(WRITTEN_GROWTH * meter.charge_size((args, kwargs)))
            return owner.format(*args, **kwargs)

        return formatted

    # ------------------------------------------------------------ meters in the tree

    @jinja2.pass_environment
    def _tick(self, _environment: jinja2.Environment, work: int) -> None:
        self._current().charge(work)

    def _sized(self, value: Any) -> Any:
        self._current().charge_size(value)
        return value

    def _concatenated(self, values: list[Any]) -> str:
        meter = self._current()
        for value in values:
            meter.charge_written(value)
        return "".join(map(str, values))

    def _sliced(self, value: Any, start: Any, stop: Any, step: Any) -> Any:
        part = slice(start, stop, step)
        if hasattr(value, "__len__"):
            num_elements = len(range(*part.indices(len(value))))
            self._current().charge(ELEMENT + num_elements * (1 if isinstance(value, str) else ELEMENT))
        return value[part]

    def _holder(self, value: Any, weight: int) -> Any:
        """What `in` searches."""
        meter = self._current()
        if isinstance(value, dict):
            meter.charge(ELEMENT)
        elif isinstance(value, str):
            meter.charge_size(value)
            meter.foresee(weight * len(value))
        else:
            meter.charge_size(value)
        return value

    @jinja2.pass_context  # there is none when a template is compiled, so that jinja2 cannot call it, and folds nothing
    def _output(self, _context: Context, value: Any) -> Any:
        if type(value) is str:
            self._current().charge(ELEMENT + len(value))
        else:
            self._current().charge_written(value)
        return value

    # ------------------------------------------------------------ what templates may call

    def _to_json(self, value: Any, *args: Any, **kwargs: Any) -> str:
        return to_json(self._current(), value, *args, **kwargs)

    def _range(self, *args: int) -> range:
        found = range(*map(checked, args))
        if len(found) > MAX_RANGE:
            raise LimitExceeded(f"a range of more than {MAX_RANGE} numbers")
        return found

    def _new_dict(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        if args and not isinstance(args[0], Mapping):  # one by one: equal hashes make it quadratic
            pairs = self._current().ticking(self._current().taken(args[0]))
            args = ({key: value for key, value in pairs}, *args[1:])  # noqa: C416  # wants pairs, as `dict` does
        found = dict(*args, **kwargs)
        self._current().charge_size(found)
        return found

    def _namespace(self, *args: Any, **kwargs: Any) -> Namespace:
        return Namespace(self._new_dict(*args, **kwargs))

    def _raise_exception(self, message: Any) -> None:
        self._current().charge_written(message)
        raise jinja2.TemplateError(str(message))


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks what a model writes, for training; here it is just its content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The content."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _strftime_now(format_: str) -> str:
    if len(format_) > 100 or re.search(r"%[^a-zA-Z%]*[0-9]", format_):
        raise SecurityError("strftime_now takes a short format without widths")
    return datetime.now().strftime(format_)
