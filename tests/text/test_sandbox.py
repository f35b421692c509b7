"""The sandbox: what is charged and refused, name by name, and that what is allowed does what jinja2 does."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import jinja2
import pytest
from jinja2 import nodes
from jinja2.defaults import DEFAULT_FILTERS, DEFAULT_TESTS
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from twostroke.text.templates.charges import ELEMENT, MAX_INT_BITS, LimitExceeded, Limits, Meter, size_of
from twostroke.text.templates.sandbox import MeteredEnvironment
from twostroke.text.templates.sandbox_filters import FILTERS, TESTS
from twostroke.text.templates.sandbox_methods import DICT_METHODS, LIST_METHODS, STR_METHODS
from twostroke.text.templates.sandbox_operators import charge_operator
from twostroke.text.templates.sandbox_tree import MAX_NODES, put_meters

# ---------------------------------------------------------------- names: each is charged or refused

REFUSED_FILTERS = {
    *("center", "filesizeformat", "forceescape", "format", "pprint", "random", "striptags", "urlencode", "urlize"),
    *("wordwrap", "xmlattr"),
}
REFUSED_METHODS: dict[type, set[str]] = {
    str: {"center", "encode", "expandtabs", "format_map", "ljust", "maketrans", "rjust", "translate", "zfill"},
    list: {"append", "clear", "extend", "insert", "pop", "remove", "reverse", "sort"},
    dict: {"clear", "fromkeys", "pop", "popitem", "setdefault", "update"},
    tuple: set(),
    int: {name for name in dir(int) if name[0] != "_"},
    float: {name for name in dir(float) if name[0] != "_"},
    range: {name for name in dir(range) if name[0] != "_"},
    type({}.items()): {"isdisjoint", "mapping"},
}
ALLOWED_METHODS: dict[type, set[str]] = {
    str: {*STR_METHODS, "format"},
    list: {*LIST_METHODS, "copy"},
    dict: {*DICT_METHODS},
    tuple: {*LIST_METHODS},
}
VALUES: dict[type, Any] = {str: "a", list: [1], dict: {"k": 1}, tuple: (1,), int: 7, float: 0.5, range: range(3)}
VALUES[type({}.items())] = {}.items()


def render(source: str, limits: Limits | None = None, **variables: Any) -> str:
    environment = MeteredEnvironment()
    template = environment.compile_metered(source)
    return environment.render_metered(template, limits or Limits(max_seconds=60), variables)


def test_every_filter_and_test_of_jinja2_is_charged_or_refused():
    """A name that a later jinja2 adds is refused; decide here whether it is to be charged."""
    assert set(DEFAULT_FILTERS) == {*FILTERS, "tojson"} | REFUSED_FILTERS
    assert set(DEFAULT_TESTS) == set(TESTS)
    environment = MeteredEnvironment()
    assert {name for name in environment.filters if " " not in name} == {*FILTERS, "tojson"}
    for name in REFUSED_FILTERS:
        with pytest.raises(jinja2.TemplateSyntaxError, match=name):
            environment.compile_metered("{{ 'a' | " + name + " }}")


@pytest.mark.parametrize("kind", REFUSED_METHODS, ids=lambda kind: kind.__name__)
def test_every_method_is_charged_or_refused(kind):
    """A name that a later Python adds is refused; decide here whether it is to be charged."""
    public = {name for name in dir(kind) if not name.startswith("_")}
    assert public == REFUSED_METHODS[kind] | ALLOWED_METHODS.get(kind, set())
    for name in REFUSED_METHODS[kind]:
        with pytest.raises(jinja2.exceptions.SecurityError, match=name):
            render("{{ value." + name + "() }}", value=VALUES[kind])
    for name in ALLOWED_METHODS.get(kind, set()):
        assert render("{{ value." + name + " is callable }}", value=VALUES[kind]) == "True"


def test_what_later_versions_add_is_refused(monkeypatch):
    class Text(str):
        def repeated(self) -> str:
            return self * 2

    monkeypatch.setitem(DEFAULT_FILTERS, "explode", lambda value: value * 2)
    monkeypatch.setitem(DEFAULT_TESTS, "explosive", lambda value: True)
    for source in ("{{ 'a' | explode }}", "{{ 'a' is explosive }}", "{{ 'a' | map('explode') | list }}"):
        with pytest.raises(jinja2.TemplateError, match="explo"):
            render(source)
    with pytest.raises(jinja2.exceptions.SecurityError, match="repeated"):
        render("{{ text.repeated() }}", text=Text("a"))
    with pytest.raises(jinja2.UndefinedError, match="lipsum"):
        render("{{ lipsum() }}")


# ---------------------------------------------------------------- every name with every kind of operand

OPERANDS: dict[str, Any] = {
    "none": None,
    "number": 3,
    "large": 2**62,
    "larger": 2**200,
    "real": 1e308,
    "text": "a-b c\n",
    "long": "ab \n" * 10_000,
    "wide": "\u0390" * 40_000,
    "list": [1, 2, 3],
    "texts": ["abc"] * 2000,
    "deep": [[["a" * 100] * 10] * 10] * 10,
    "mapping": {"a": 1, "b": "x" * 1000},
    "nested": {"a": {"b": ["c"] * 1000}},
    "format": "%s %d %.2f",
}
SMALL = Limits(max_output_chars=100_000, max_work=400_000, max_step=100_000, max_seconds=60)
BOUND = 12 * SMALL.max_step


def grown(forms: Iterable[str], num_operands: int = 1) -> list[str]:
    """Those of which a result is larger than anything that was charged could be. `a`, `b`: any operands."""
    environment, kept = MeteredEnvironment(), []
    found = []
    for form in forms:
        template = environment.compile_metered("{{ keep(" + form + ") }}")
        for names in itertools.product(OPERANDS, repeat=num_operands):
            kept.clear()
            operands = dict(zip("ab", (OPERANDS[name] for name in names), strict=False))
            keep = {"keep": lambda value: kept.append(list_of(value))}
            try:
                environment.render_metered(template, SMALL, {**OPERANDS, **operands, **keep})
            except (MemoryError, RecursionError):
                found.append(f"{form} with {names}")
            except Exception:  # a wrong operand; that it is one in little time and memory is what counts
                continue
            if kept and size_of(kept[0], 2 * BOUND) > BOUND:
                found.append(f"{form} with {names}")
    return found


def list_of(value: Any) -> Any:
    return value if not hasattr(value, "__next__") else list(itertools.islice(value, 100_000))


@pytest.mark.timeout(120)
def test_no_operator_makes_more_than_it_is_charged():
    operators = ("+", "-", "*", "/", "//", "%", "**", "~", "==", "!=", "<", "in", "not in")
    assert grown((f"a {operator} b" for operator in operators), 2) == []


ARGUMENTS = ("", "number", "large", "text", "long", "list", "text, long", "large, long", "'', long")


@pytest.mark.timeout(120)
def test_no_filter_or_test_makes_more_than_it_is_charged():
    calls = list(itertools.product(sorted({*FILTERS, "tojson"}), ARGUMENTS))
    assert grown(f"a | {name}({args})" for name, args in calls) == []
    assert grown(f"[a] | select('{name}') | list" for name in TESTS) == []
    assert grown((f"[a] | select('{name}', b) | list" for name in ("eq", "lt", "in", "divisibleby", "sameas")), 2) == []


@pytest.mark.timeout(120)
def test_no_method_makes_more_than_it_is_charged():
    names = sorted({*STR_METHODS, "format", *LIST_METHODS, *DICT_METHODS})
    assert grown(f"a.{name}({args})" for name, args in itertools.product(names, ARGUMENTS)) == []


@pytest.mark.parametrize(("left", "right"), [(2**63, 2**63), (2**200, 1), (-(2**64), 2), (3, 2**62)])
def test_integers_stay_small(left, right):
    with pytest.raises(LimitExceeded, match=f"more than {MAX_INT_BITS} bits"):
        render("{{ a * b * b }}", a=left, b=right)
    with pytest.raises(LimitExceeded, match=f"more than {MAX_INT_BITS} bits"):
        render("{{ [a, b, a, b, a, b] | sum + 2 ** 63 + 2 ** 63 }}", a=max(left, 2**62), b=right)
    assert render("{{ 2 ** 10 }} {{ 7 // 2 }} {{ 2 ** -1 }} {{ 2 ** 63 }}") == f"1024 3 0.5 {2**63}"


def test_a_source_of_too_many_parts_is_refused_when_it_is_loaded():
    many = nodes.Template([nodes.Output([nodes.Const(1, lineno=1)] * MAX_NODES, lineno=1)], lineno=1)
    with pytest.raises(jinja2.TemplateSyntaxError, match=f"more than {MAX_NODES}"):
        put_meters(many)


def test_a_charge_comes_before_the_operation():
    """Operands that cannot be operated on: whoever applied the operator first would see another error."""

    class Untouched(str):
        def __mul__(self, count: Any) -> Any:
            raise AssertionError("was multiplied before it was charged")

    with pytest.raises(LimitExceeded):
        render("{{ text * 1000000 }}", SMALL, text=Untouched("ab"))
    meter = Meter(SMALL)
    with pytest.raises(LimitExceeded, match="in one operation"):
        charge_operator(meter, "+", "a" * 60_000, "b" * 60_000)


def test_nothing_is_evaluated_when_a_template_is_compiled():
    environment = MeteredEnvironment()
    calls: list[Any] = []
    environment.filters["spy"] = environment.tests["spied"] = calls.append
    template = environment.compile_metered(
        "{{ 1 | spy }}{% if 2 | spy %}{% endif %}{{ 3 is spied }}{{ [4 | spy] | length }}"
    )
    assert calls == []
    environment.render_metered(template, Limits(), {})
    assert calls == [1, 2, 3, 4]


def test_sizes_are_those_of_what_is_written_out():
    assert size_of("abc", 1000) == ELEMENT + 3
    assert size_of([1, "ab", {"k": None}], 1000) == 6 * ELEMENT + 2 + 1
    assert size_of({"a": 1}.items(), 1000) == 4 * ELEMENT + 1
    nested: Any = ["a"]
    for _ in range(100):
        nested = [nested, nested]
    assert 1000 < size_of(nested, 1000) < 2000
    itself = Namespace()
    itself["me"] = itself
    assert size_of(itself, 1000) > 1000


# ---------------------------------------------------------------- what is allowed does what jinja2 does

ORDINARY = [
    "text.split('-')[-1]",
    "text.rsplit('-', 1)[0]",
    "text.rstrip('\n')",
    "text.lstrip('\n ')",
    "text.strip()",
    "text.startswith('a')",
    "text.endswith(('x', '\n'))",
    "text.find('c')",
    "text.rfind('c')",
    "text.rpartition('-') | list",
    "text.replace('a', 'bb', 1)",
    "text.upper() ~ text.title() ~ text.capitalize()",
    "', '.join(texts[:3])",
    "text.splitlines()",
    "text[::-1] ~ text[1:] ~ text[-1]",
    "list[::-1] ~ list[1:2]",
    "nested.items() | list | length",
    "nested.get('z', 7) ~ nested.get('a').keys() | list",
    "'a' in mapping, 'z' not in mapping, 2 in list, 'b' in text, 1 < number < 4",
    "number in list and list == [1, 2, 3] and text != 'x' and number % 2 == 1",
    "[{'n': 2}, {'n': 1}] | sort(attribute='n') | map(attribute='n') | join('/')",
    "[{'n': 2}, {'m': 1}] | selectattr('n', 'defined') | list",
    "[{'n': 2}, {'n': 1}] | rejectattr('n', 'equalto', 2) | list",
    "[{'n': 2}, {'n': 1}] | groupby('n') | list",
    "[{'n': 2}, {'n': 1}] | sum(attribute='n')",
    "[3, 1, 3] | unique | list, [3, 1] | min, [3, 1] | max, [3, 1] | first, [3, 1] | last",
    "[1, 2, 3] | batch(2, 'x') | list, [1, 2, 3] | slice(2) | list, [1, 2] | reverse | list",
    "['a', ''] | select | list, ['a', 1] | select('string') | list, [1, 2] | reject('odd') | list",
    "mapping | dictsort | first, mapping | items | first, mapping | length, mapping | list",
    "text | indent(2), text | trim('\n') | upper, text | replace('a', 'x') | title, 'ab cd' | truncate(4)",
    "'12' | int + 1, '0x1f' | int(0, 16), 'x' | int(5), '1.5' | float, 2.56 | round(1), 2.5 | round(0, 'floor')",
    "'%s-%d-%.2f-%5s%%' % ('a', 3, 1.5, 'b'), '%s' % 'x', '{} {n}'.format(1, n=2)",
    "'a' * 3 ~ [0] * 2, -3 | abs, 7 // 2, 7 / 2, -number",
    "none | default('x'), '' | default('x', true), undefined_name | default('y')",
    "'a<b' | e, ('a<b' | safe) + 'c', text is string, mapping is mapping, list is iterable, list is sequence",
    "range(3) | list, range(1, 9, 3) | list, dict(a=1), dict([['k', 2]]), 'ab' | list, 'a b' | wordcount",
    "text is upper, 'abc' is lower, 4 is divisibleby 2, 3 is eq 3, 'a' is in ['a'], 3 is ge(2)",
]


@pytest.mark.parametrize("expression", ORDINARY)
def test_does_what_jinja2_does(expression):
    source = "{% set all = [" + expression.replace("\n", "\\n") + "] %}{{ all }}"
    plain = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(source)
    assert render(source, **OPERANDS) == plain.render(**OPERANDS)


def test_names_that_only_their_number_bounds():
    assert render("{{ text.rsplit('</think>')[-1] }}", text="<think>a</think>b") == "b"
    with pytest.raises(LimitExceeded, match="33 characters; at most 32"):
        render("{{ text.rsplit('x' * 33) }}", text="abc")
    assert render("{{ ('9' * 1001) | int(5) }}") == "5"  # too long for a number


def test_a_long_chat_stays_far_from_the_limits():
    """2,048 messages of 2 kB, with what templates do to each."""
    source = """{%- for m in messages %}{% set c = m.content %}
    {%- if '</think>' in c %}{% set c = c.split('</think>')[-1].lstrip('\\n') %}{% endif %}
    {{- '<' + m['role'] + '>' + c | trim + '\\n' }}{% endfor %}"""
    chat = [{"role": role, "content": "<think>a</think>" + "word " * 384} for role in ["user", "assistant"] * 1024]
    assert len(render(source, Limits(max_work=30_000_000, max_seconds=60), messages=chat)) > 3_900_000
