"""Renders untrusted templates with bounds on time, memory and output. Knows no chats.

jinja2's sandbox protects Python's internals, but sets no bounds on time and memory. So every render has a meter
(charges.py), and each operation that can repeat or grow is charged before it runs, by the sizes of its operands:

    loops and macros    each round, with the literal text in it
    operators           the size of the result; integers have at most 64 bits; slices, `in` and `==` are charged too
    methods             by the rules of sandbox_methods.py; other methods are refused
    filters and tests   by the rules of sandbox_filters.py; others are refused
    list, dict, tuple   their size when written out, so that nested copies cannot hide it
    output              every character

Nothing is evaluated when a template is compiled. One operation holds the GIL for at most `Limits.max_step` units of
work, about 10 to 100 ms; between operations the clock is checked.
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
    """jinja2's sandbox with a meter. One environment can render in several threads at once."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self) -> None:
        # Not optimized: the optimizer folds constants, i.e. evaluates expressions without a meter.
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
        """Compile a template with meters. Render it by `render_metered`.

        Raises:
            jinja2.TemplateSyntaxError: the source is invalid, or larger than any chat template.
            RecursionError, MemoryError, SyntaxError, ValueError: it nests too deeply.
        """
        tree = self.parse(source)
        put_meters(tree)
        return jinja2.Template.from_code(self, self.compile(tree), self.make_globals(None))

    def render_metered(self, template: jinja2.Template, limits: Limits, variables: Mapping[str, Any]) -> str:
        """Render a template.

        Raises:
            LimitExceeded: the render exceeds `limits`.
            jinja2.TemplateError, or any other exception of a wrong template.
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
        """Charge and run a call in a template."""
        meter = self._current()
        instead = charge_call(meter, obj, args, kwargs)
        if instead is not None:
            return super().call(context, obj, *instead, **kwargs)
        if isinstance(obj, Macro) and (obj.catch_varargs or obj.catch_kwargs):  # it puts the arguments into containers
            meter.charge_size((args, kwargs))
        meter.charge(ELEMENT)
        result = super().call(context, obj, *args, **kwargs)
        meter.charge(len(result) if isinstance(result, str) else 1)
        return result

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Charge and apply an operator."""
        if operator == "+" and type(left) is str and type(right) is str:
            self._current().charge(ELEMENT + len(left) + len(right))
            return left + right
        charge_operator(self._current(), operator, left, right)
        return checked(super().call_binop(context, operator, left, right))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Return whether a template may use the attribute."""
        return is_allowed(obj, attr) and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Replace `str.format`: only bare fields are allowed, without widths, conversions, attributes or indices."""
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
        """Charge the search of `in` in `value`, and return `value`."""
        meter = self._current()
        if isinstance(value, dict):
            meter.charge(ELEMENT)
        elif isinstance(value, str):
            meter.charge_size(value)
            meter.foresee(weight * len(value))
        else:
            meter.charge_size(value)
        return value

    @jinja2.pass_context  # no context exists at compile time, so jinja2 folds no output
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
        if args and not isinstance(args[0], Mapping):  # charge each pair: equal hashes make insertion quadratic
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
    """`{% generation %}…{% endgeneration %}` marks the model's own text, for training; here only the content counts."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return the statements inside the tag."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _strftime_now(format_: str) -> str:
    if len(format_) > 100 or re.search(r"%[^a-zA-Z%]*[0-9]", format_):
        raise SecurityError("strftime_now takes a short format without widths")
    return datetime.now().strftime(format_)
