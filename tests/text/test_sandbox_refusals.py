"""What the sandbox refuses, and by which of its charges and rules: before it is done, and not by the clock."""

from __future__ import annotations

import subprocess
import sys
import traceback

import pytest

from twostroke.core.errors import CheckpointError, InvalidRequest
from twostroke.text.templates import charges
from twostroke.text.templates.charges import Limits
from twostroke.text.templates.template import ChatTemplate

CHAT = [{"role": "user", "content": "x" * 1000}]
NESTED = "{% set ns = namespace(y=[1], x=1) %}{% for i in range(60) %}"
LETTERS = "'a' * 2000000"
AGAIN = (
    "{% set number = messages | length %}{% set long = 'a' * 400000 %}{% set texts = ['a'] * 20000 %}"
    "{% for i in range(100) %}"
)
STEP = "characters of work in one operation"
WORK = "more than 8000000 steps and characters of work;"
BITS = "an integer of more than 64 bits"

# Each once took minutes or gigabytes in one call that held the interpreter's lock, or is a neighbour of one that did:
# which function of the sandbox refuses it, what it says, and the template.
UNBOUNDED = {
    "round": ("_round", "must be a number of digits", "{{ 1.5 | round(30000, 'floor') }}"),
    "round at a request": (
        "_round",
        "must be a number of digits",
        "{{ (messages | length) | round(30000, 'ceil') }}",
    ),
    "round to the left": ("_round", "must be a number of digits", "{{ (messages | length) | round(-30000) }}"),
    "round a text": ("_numeric", "a number is needed, not a str", "{{ 'abc' | round(9, 'floor') }}"),
    "strip": (
        "_pattern_chars",
        "strip with 2000001 characters; at most 32",
        "{{ (" + LETTERS + ").strip('b' * 2000000 + 'a') | length }}",
    ),
    "trim": (
        "_pattern_chars",
        "strip with 2000001 characters; at most 32",
        "{{ (" + LETTERS + ") | trim('b' * 2000000 + 'a') | length }}",
    ),
    "rfind": (
        "_pattern_chars",
        "a search from the end with 1000002 characters; at most 32",
        "{{ (" + LETTERS + ").rfind('ab' + 'a' * 1000000) }}",
    ),
    "rindex": (
        "_pattern_chars",
        "a search from the end with 1000002 characters; at most 32",
        "{{ (" + LETTERS + ").rindex('ab' + 'a' * 1000000) }}",
    ),
    "rsplit": (
        "_pattern_chars",
        "a search from the end with 1000002 characters; at most 32",
        "{{ (" + LETTERS + ").rsplit('ab' + 'a' * 1000000) | length }}",
    ),
    "rpartition": (
        "_pattern_chars",
        "a search from the end with 1000002 characters; at most 32",
        "{{ (" + LETTERS + ").rpartition('ab' + 'a' * 1000000) | length }}",
    ),
    "sum of lists": ("_numeric", "a number is needed, not a list", "{{ [[0], [1]] | sum(start=[]) | length }}"),
    "divided integer": ("charge_operator", "// takes numbers, not int and list", "{{ 7 // messages | list }}"),
    "integer's rest": ("apply", BITS, "{% if ('f' * 900) | int(0, 16) % 7 %}{% endif %}"),
    "integer in the source": ("put_meters", BITS, "{{ 0x" + "f" * 100_000 + " % 7 }}"),
    "cycler": (
        "call",
        "'cycler' is undefined",
        NESTED + "{% set ns.x = cycler(ns.x, ns.x).items %}{% endfor %}{{ ns.x == ns.x }}",
    ),
    "named formats": (
        "_charge_format",
        "must have plain conversions",
        "{{ ('%(a)s%(a)s' % {'a': messages[0].content}) | length }}",
    ),
    "wide formats": ("_charge_format", "must have plain conversions", "{{ '%999999999d' % 1 }}"),
    "formats as a test": ("_numeric", "a number is needed, not a str", "{{ '%3000000000d' is odd }}"),
    "formats as another": ("_numeric", "a number is needed, not a str", "{{ '%3000000000d' is divisibleby(3) }}"),
    "bytes of integers": ("call", "access to attribute 'to_bytes'", "{{ (1).to_bytes(1000000000) }}"),
    "powers": ("_foresee_bits", BITS, "{% if 2 ** 1000000000 %}{% endif %}"),
    "product in the source": ("_charge_product", STEP, "{% if 'a' * 10000000000 %}{% endif %}"),
    "product of lists": ("_charge_product", STEP, "{% if [0] * 10000000000 %}{% endif %}"),
    "rest of arguments": (
        "call",
        WORK,
        "{% macro m(n) %}{% if n %}{{ m(n - 1, varargs, varargs) }}{% else %}{{ varargs == 1 }}"
        "{{ varargs | string | length }}{% endif %}{% endmacro %}{{ m(60) }}",
    ),
    "error of nested spaces": (
        "_raise_exception",
        STEP,
        "{% set ns = namespace(x=1) %}{% for i in range(60) %}{% set n = namespace() %}"
        "{% set n.a = ns.x %}{% set n.b = ns.x %}{% set ns.x = n %}{% endfor %}{{ raise_exception(ns) }}",
    ),
    "indent of odd lines": ("_indent", STEP, "{{ ('\u2028' * 1000) | indent(1000000) | length }}"),
    "long attribute": (
        "_check_attribute",
        "an attribute's name of 200001 characters",
        "{{ range(100000) | map(attribute='a' + '.a' * 100000) | list | length }}",
    ),
    "long attribute of all": ("_items", STEP, "{{ range(100000) | sum(attribute='a' + '.a' * 120) }}"),
    "joined defaults": (
        "taken",
        WORK,
        "{{ range(100000) | map('attr', 'z') | map('default', 'x' * 1000000) | join | length }}",
    ),
    "batched defaults": (
        "taken",
        WORK,
        NESTED + "{% for g in [0, 0] | map('attr', 'z') | map('default', ns.y) | batch(2) %}"
        "{% set ns.y = g %}{% endfor %}{% endfor %}{{ ns.y | string | length }}",
    ),
    "batches filled": ("_filled", STEP, "{{ [0] | batch(3000, messages[0].content * 3) | list | length }}"),
    "words": ("rule", STEP, "{{ ('- ' * 200000) | title | length }}"),
    "large words": ("_charge_product", STEP, "{{ ('- ' * 2000000) | title | length }}"),
    "json of depth": (
        "to_json",
        WORK,
        "{% set ns = namespace(t=[1]) %}{% for i in range(300) %}{% set ns.t = [ns.t, 1] %}{% endfor %}"
        "{% for i in range(1000) %}{{ ns.t | tojson(indent=16) | length }}{% endfor %}",
    ),
    "json with separators": (
        "_short",
        "must be two texts",
        "{{ ([1] * 10000) | tojson(separators=('x' * 100000, ':')) | length }}",
    ),
    "many formats": ("formatted", WORK, "{% set x = 'y' * 100000 %}{{ ('{a}' * 100000).format(a=x) | length }}"),
    "autoescape": (
        "put_meters",
        "autoescape is not for chats",
        "{% autoescape true %}{{ '&' * 1000000 }}{% endautoescape %}",
    ),
    "looking again": (
        "_sized",
        WORK,
        "{% set b = [['x'] * 9000] %}{% for i in range(100000) %}{% if [['x'] * 9000] == b %}{% endif %}{% endfor %}",
    ),
    "silent condition": (
        "_concatenated",
        WORK,
        "{% set a = 'a' * 1000000 %}{% for i in range(90000) if a ~ i == 'x' %}{% endfor %}",
    ),
    "odd text": ("_numeric", "a number is needed, not a str", "{{ 'a' is odd }}"),
    "even text": ("_numeric", "a number is needed, not a str", "{{ 'a' is even }}"),
    "text divisible": ("_numeric", "a number is needed, not a str", "{{ 'a%d' is divisibleby(3) }}"),
    "divisible by a text": ("_numeric", "a number is needed, not a str", "{{ 3 is divisibleby('a') }}"),
    "precise text": ("_round", "must be a number of digits", "{{ 1.5 | round('9') }}"),
    "start of a sum": ("_numeric", "a number is needed, not a str", "{{ [1] | sum(start='a') }}"),
    "long format": ("_charge_format", "a text format of 100001 characters", "{{ ('%' * 100001) % 1 }}"),
    "format of much": ("_charge_format", STEP, "{{ '%s' % [messages[0].content * 500] }}"),
    "format of numbers": ("_charge_format", STEP, "{{ ('%d' * 9000) % 1 }}"),
    "name of attr": ("_check_attribute", "an attribute's name of 257", "{{ messages | attr('a' * 257) }}"),
    "name to sort by": ("_check_attribute", "an attribute's name of 257", "{{ [] | sort(attribute='a' * 257) }}"),
    "name to group by": ("_check_attribute", "an attribute's name of 257", "{{ [] | groupby('a' * 257) }}"),
    "name to join": ("_check_attribute", "an attribute's name of 257", "{{ [] | join('', 'a' * 257) }}"),
    "name to select by": ("_check_attribute", "an attribute's name of 257", "{{ [1] | selectattr('a' * 257) | list }}"),
    "list as a name": ("_check_attribute", "cannot be a list", "{{ [] | map(attribute=messages) | list }}"),
    "joined by a long text": ("charge_join", STEP, "{{ range(1000) | join('x' * 10000) | length }}"),
    "text's join": ("charge_join", STEP, "{{ ('x' * 10000).join(['a'] * 1000) | length }}"),
    "compared at the left": ("_sized", WORK, AGAIN + "{% if long == number %}{% endif %}{% endfor %}"),
    "compared at the right": ("_sized", WORK, AGAIN + "{% if number == long %}{% endif %}{% endfor %}"),
    "compared in a chain": ("_sized", WORK, AGAIN + "{% if number == number != long %}{% endif %}{% endfor %}"),
    "test at the left": ("_both", WORK, AGAIN + "{% if long is eq(number) %}{% endif %}{% endfor %}"),
    "test at the right": ("_both", WORK, AGAIN + "{% if number is eq(long) %}{% endif %}{% endfor %}"),
    "held in a list": ("_holder", WORK, AGAIN + "{% if number in texts %}{% endif %}{% endfor %}"),
    "held in a text": (
        "_holder",
        STEP,
        "{% set long = 'a' * 1500000 %}{% if messages[0].content in long %}{% endif %}",
    ),
    "false condition": (
        "_sized",
        WORK,
        "{% set no = 0 %}{% for i in range(20) %}{% for j in range(100000) if no %}{% endfor %}{% endfor %}",
    ),
    "number in a list of the source": ("put_meters", BITS, "{{ [1, -0x1" + "0" * 16 + "] }}"),
    "separators that are no texts": ("_short", "must be two texts", "{{ [1] | tojson(separators=[',', 1]) }}"),
    "indent of json": ("to_json", "tojson(indent=17)", "{{ [1] | tojson(indent=17) }}"),
    "elements of a generator": (
        "taken",
        WORK,
        "{{ range(1000) | map('attr', 'z') | map('default', 'x' * 100000) | list | length }}",
    ),
    "parts of each attribute": (
        "ticking",
        WORK,
        "{% set deep = [{'a': {'a': {'a': {'a': {'a': 1}}}}}] * 1000 %}{% for i in range(110) %}"
        "{% for x in deep | map(attribute='a.a.a.a.a') %}{% endfor %}{% endfor %}",
    ),
    "rounds of a generator": (
        "ticking",
        WORK,
        "{% for i in range(20) %}{{ range(100000) | select('none') | first }}{% endfor %}",
    ),
    "escaped sum": ("_charge_sum", STEP, "{{ (('a' | safe) + '&' * 900000) | length }}"),
    "slices of a text": ("_sliced", WORK, AGAIN + "{% if long[1:] %}{% endif %}{% endfor %}"),
    "slices of a list": ("_sliced", WORK, AGAIN + "{% if texts[1:] %}{% endif %}{% endfor %}"),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", UNBOUNDED)
def test_is_refused_by_its_own_charge(name):
    refuser, said, source = UNBOUNDED[name]
    limits = Limits(max_work=8_000_000, max_step=4_000_000, max_seconds=60)
    with pytest.raises((InvalidRequest, CheckpointError)) as caught:
        ChatTemplate({"default": source}, limits=limits).render(CHAT)
    assert said in caught.value.message
    assert len(caught.value.message) < 700
    assert refuser_of(caught.value) == refuser


def refuser_of(error: BaseException) -> str:
    """The function of the sandbox that refused: several say the same, and one after the work is too late."""
    first = error.__context__
    assert first is not None
    frames = traceback.extract_tb(first.__traceback__)
    folder = charges.__file__.rpartition("/")[0]
    names = [frame.name for frame in frames if frame.filename.startswith((folder + "/sandbox", charges.__file__))]
    return [name for name in names if name not in PAYING][-1]


PAYING = {"charge", "charge_size", "charge_written", "foresee", "checked", "<genexpr>"}


IN_LITTLE_MEMORY = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from twostroke.text.templates.charges import LimitExceeded, Limits
from twostroke.text.templates.sandbox import MeteredEnvironment
from test_sandbox_refusals import CHAT, UNBOUNDED, WORST
import jinja2
pages = int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 400 * 2**20,) * 2)
environment = MeteredEnvironment()
for name in WORST:
    try:
        template = environment.compile_metered(UNBOUNDED[name][2])
        environment.render_metered(template, Limits(max_seconds=60), {"messages": CHAT})
    except (LimitExceeded, jinja2.TemplateError):
        continue
    raise SystemExit(f"{name} was not refused")
"""
WORST = ("named formats", "product in the source", "joined defaults", "indent of odd lines", "large words", "strip")


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_memory_stays_bounded():
    command = [sys.executable, "-c", IN_LITTLE_MEMORY, str(__file__).rpartition("/")[0]]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
