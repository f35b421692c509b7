"""Tests reach through at most one private attribute: what lies behind a second is nobody's promise."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


def reaches(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of each attribute that is reached through two or more private ones."""
    for node in ast.walk(ast.parse(source)):
        names, inner = [], node
        while isinstance(inner, ast.Attribute | ast.Subscript | ast.Call):
            if isinstance(inner, ast.Attribute):
                names.append(inner.attr)
                inner = inner.value
            else:
                inner = inner.value if isinstance(inner, ast.Subscript) else inner.func
        is_private = isinstance(node, ast.Attribute) and _is_private(node.attr)
        if is_private and sum(map(_is_private, names)) > 1:
            yield node.lineno, ast.unparse(node)


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_no_test_reaches_through_two_private_attributes():
    found = [
        f"{path.relative_to(TESTS)}:{line}: {text}"
        for path in sorted(TESTS.rglob("*.py"))
        for line, text in reaches(path.read_text())
    ]
    assert not found, "give the object a public view, or hand the part in"


@pytest.mark.parametrize(
    ("source", "is_reaching"),
    [("a._b", False), ("a._b.c", False), ("a._b._c", True), ("a._b.c[0]._d = 1", True), ("a._b().c._d()", True),
     ("a.b._c", False), ("self._stream.__aenter__()", False), ("f(a._b)._c", False)],
)  # fmt: skip
def test_reaching_is_seen(source: str, is_reaching: bool):
    assert bool(list(reaches(source))) is is_reaching
