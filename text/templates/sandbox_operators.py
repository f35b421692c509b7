"""Charges of a template's operators before they are applied."""

from __future__ import annotations

import re
from typing import Any

from jinja2.exceptions import SecurityError
from jinja2.runtime import Undefined
from markupsafe import Markup

from .charges import ELEMENT, MAX_INT_BITS, WRITTEN_GROWTH, LimitExceeded, Meter
from .sandbox_methods import ESCAPE_GROWTH

MAX_FORMAT_CHARS = 100_000
_NUMBER_CHARS = 512  # bound of a formatted number with a width of two digits: 1e308 has 309
_CONVERSION = re.compile(r"%(?:[-+ #0]{0,5}\d{0,2}(?:\.\d{0,2})?[a-zA-Z]|%)")


def charge_operator(meter: Meter, operator: str, left: Any, right: Any) -> None:
    """Charge `left` `operator` `right`, for `+ - * / // % **`.

    Raises:
        LimitExceeded: it would exceed the remaining work, or make an integer of more than 64 bits.
        SecurityError: no chat template needs this operator with these operands.
    """
    numbers = isinstance(left, (int, float)) and isinstance(right, (int, float))
    if numbers:
        meter.charge(1)
        if operator in ("*", "**"):
            _foresee_bits(operator, left, right)
    elif isinstance(left, Undefined) or isinstance(right, Undefined):
        return  # jinja2 raises its own error for undefined values
    elif operator == "+":
        _charge_sum(meter, left, right)
    elif operator == "*":
        _charge_product(meter, left, right)
    elif operator == "%" and isinstance(left, str):
        _charge_format(meter, left, right)
    else:
        raise SecurityError(f"{operator} takes numbers, not {type(left).__name__} and {type(right).__name__}")


def _foresee_bits(operator: str, left: Any, right: Any) -> None:
    if not (isinstance(left, int) and isinstance(right, int)):
        return
    bits = left.bit_length()
    num_bits = bits + right.bit_length() - 1 if operator == "*" else (bits - 1) * right
    if num_bits > MAX_INT_BITS:  # lower bound of the result's bits; `checked` tests the exact result
        raise LimitExceeded(f"an integer of more than {MAX_INT_BITS} bits")


def _charge_sum(meter: Meter, left: Any, right: Any) -> None:
    size = meter.charge_size(left) + meter.charge_size(right)
    meter.foresee(size)
    if isinstance(left, Markup) or isinstance(right, Markup):
        meter.charge(size * ESCAPE_GROWTH)


def _charge_product(meter: Meter, left: Any, right: Any) -> None:
    for sequence, count in ((left, right), (right, left)):
        if isinstance(sequence, (str, list, tuple)) and isinstance(count, int):
            size = len(sequence) if isinstance(sequence, str) else meter.charge_size(sequence)
            meter.charge(ELEMENT + size * max(0, count))


def _charge_format(meter: Meter, left: str, right: Any) -> None:
    """Charge `left % right`. Each conversion uses one argument; named ones could repeat one and are refused."""
    if len(left) > MAX_FORMAT_CHARS:
        raise LimitExceeded(f"a text format of {len(left)} characters; at most {MAX_FORMAT_CHARS}")
    rest = _CONVERSION.sub("", left)
    if "%" in rest:
        raise SecurityError("text formats must have plain conversions, like %s, %d or %.2f; no names, no large widths")
    size = meter.charge_size(left) + meter.charge_size(right) * WRITTEN_GROWTH
    meter.charge(size + _NUMBER_CHARS * left.count("%") + ELEMENT)
