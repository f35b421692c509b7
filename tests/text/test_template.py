"""Chat templates in the styles of the common families, with transformers as the oracle; and hostile ones."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models

from twostroke.core.errors import CheckpointError, InvalidRequest
from twostroke.text.templates.sandbox import Limits
from twostroke.text.templates.template import MAX_TEMPLATE_CHARS, ChatTemplate

BUNDLED = Path(__file__).parents[2] / "model" / "bundled"

MARKED_TURNS = """\
{% for message in messages %}
    {% if loop.first and message['role'] != 'system' %}
<|start|>system
Be brief.<|stop|>
    {% endif %}
<|start|>{{ message['role'] }}
{{ message['content'] }}<|stop|>
{% endfor %}
{% if add_generation_prompt %}
<|start|>assistant
{% endif %}
"""

HEADERS = """\
{{- bos_token }}
{%- set ns = namespace(system=none, turns=messages) %}
{%- if messages and messages[0].role == 'system' %}
    {%- set ns.system = messages[0].content | trim %}
    {%- set ns.turns = messages[1:] %}
{%- endif %}
{%- if ns.system is not none %}
    {{- '<|head|>system<|body|>\\n\\n' ~ ns.system ~ '<|turn|>' }}
{%- endif %}
{%- for m in ns.turns %}
    {{- '<|head|>' + m['role'] + '<|body|>\\n\\n' + m['content'] | trim + '<|turn|>' }}
    {%- if loop.index0 > 6 %}{%- break %}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|head|>assistant<|body|>\\n\\n' }}{%- endif %}
"""

ALTERNATING = """\
{{ bos_token }}{% for message in messages %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('turns must alternate user/assistant/user/…') }}
{%- endif %}
{%- if message.role == 'user' %}
{{- ' [ASK] ' + message.content.strip() + ' [/ASK]' }}
{%- elif message.role == 'assistant' %}
{%- generation %}{{ ' ' + message.content + eos_token }}{% endgeneration %}
{%- else %}
{{- raise_exception('unknown role ' ~ message.role) }}
{%- endif %}
{%- endfor %}
"""

TOOLS = """\
{%- macro describe(tool, depth=0) -%}
{{ '  ' * depth }}- {{ tool.name }}: {{ tool.parameters | tojson }}
{%- for part in tool.get('parts', []) %}
{{ describe(part, depth + 1) }}
{%- endfor %}
{%- endmacro -%}
{%- if tools is not none and tools | length > 0 %}
Tools:
{%- for tool in tools %}
{{ describe(tool.function if tool.function is defined else tool) }}
{%- endfor %}
{{ tools | map(attribute='name', default='?') | join(', ') }}
{{ tools | tojson(indent=2) }}
{% endif %}
{%- for message in messages | selectattr('content', 'defined') %}
{%- if message.content is string %}{% set text = message.content %}
{%- else %}{% set text = message.content | map(attribute='text') | join(' + ') %}{% endif %}
[{{ loop.index }}/{{ loop.length }} {{ message.role | upper }}] {{ text | replace('\\n', ' ') }}
{%- for call in message.tool_calls or [] %}
=> {{ call.name }}({% for k, v in call.arguments | items %}{{ k }}={{ v | tojson }}{{ ', ' if not loop.last }}
{%- endfor %})
{%- endfor %}
{%- endfor %}
"""

CHATS = [
    [{"role": "user", "content": "  hi  "}],
    [{"role": "system", "content": "Be <kind> & 'good'"}, {"role": "user", "content": "ä日👩\n\n{{ 7*7 }}"}],
    [{"role": role, "content": f"turn {n}"} for n, role in enumerate(["user", "assistant"] * 6)],
    [{"role": "assistant", "content": "me first"}],
    [{"role": "tool", "content": ""}],
    [],
]
ONE = CHATS[0]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
TOOL_LIST = [
    {"name": "add", "parameters": {"a": "int", "ü": [1, None, True]}, "parts": [{"name": "sub", "parameters": {}}]},
    {"type": "function", "function": {"name": "<f>", "parameters": {}}},
]


def oracle(source: str):
    from transformers import PreTrainedTokenizerFast

    backend = tokenizers.Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}, "<s>"))
    theirs = PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)
    theirs.chat_template = source
    return theirs


@pytest.mark.parametrize(
    "source", [MARKED_TURNS, HEADERS, ALTERNATING, TOOLS], ids=["turns", "heads", "strict", "tools"]
)
@pytest.mark.parametrize("prompt", [True, False])
def test_renders_as_transformers_does(source, prompt):
    ours, theirs = ChatTemplate({"default": source}, SPECIAL), oracle(source)
    rendered = refused = 0
    for chat in CHATS:
        for tools in (None, TOOL_LIST):
            arguments = {"tokenize": False, "add_generation_prompt": prompt, "tools": tools}
            try:
                expected = theirs.apply_chat_template(chat, **arguments)
            except Exception:
                refused += 1
                with pytest.raises(InvalidRequest) as caught:
                    ours.render(chat, prompt, tools)
                assert caught.value.param == "messages"
            else:
                rendered += 1
                assert ours.render(chat, prompt, tools) == expected
    assert rendered >= 4
    assert refused == (2 if source != ALTERNATING else 8)  # no messages at all; and out of turn


def test_structured_contents_and_tool_calls_render_as_transformers_does():
    chat = [
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "add", "arguments": {"a": 1, "b": "<x>"}}]},
    ]
    expected = oracle(TOOLS).apply_chat_template(chat, tokenize=False)
    assert ChatTemplate({"default": TOOLS}, SPECIAL).render(chat, add_generation_prompt=False) == expected
    assert '=> add(a=1, b="<x>")' in expected


@pytest.mark.skipif(not (BUNDLED / "tokenizer_config.json").exists(), reason="the bundled model is not there yet")
def test_the_bundled_models_chats_have_the_same_ids_as_with_transformers():
    from transformers import AutoTokenizer

    from twostroke.text.tokenizer import Tokenizer

    theirs, ours, template = AutoTokenizer.from_pretrained(BUNDLED), Tokenizer.load(BUNDLED), ChatTemplate.load(BUNDLED)
    assert template is not None
    for chat in CHATS[:4]:
        ids = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert ours.encode(template.render(chat), add_special_tokens=False) == ids


def test_the_templates_own_words_reach_the_client():
    with pytest.raises(InvalidRequest, match=r"turns must alternate.*roles: 2 × user") as caught:
        ChatTemplate({"default": ALTERNATING}, SPECIAL).render([{"role": "user", "content": "a"}] * 2)
    assert caught.value.param == "messages"


def test_messages_are_not_changed_and_threads_do_not_meet():
    template = ChatTemplate({"default": HEADERS}, SPECIAL)
    chats = [[{"role": "user", "content": f"{n}"}] for n in range(200)]
    alone = [template.render(chat) for chat in chats]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(template.render, chats)) == alone
    assert chats[7] == [{"role": "user", "content": "7"}]


# ---------------------------------------------------------------- where templates come from


def test_loads_a_string_named_templates_and_files(tmp_path):
    assert ChatTemplate.load(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"bos_token": {"content": "<b>"}, "chat_template": "{{ bos_token }}string"}))
    assert ChatTemplate.load(tmp_path).render(ONE) == "<b>string"
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools[0].name }}"}]
    config.write_text(json.dumps({"chat_template": named}))
    template = ChatTemplate.load(tmp_path)
    assert template.render(ONE) == "plain"
    assert template.render(ONE, tools=[{"name": "hammer"}]) == "hammer"
    (tmp_path / "chat_template.jinja").write_text("file")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("tool file")
    template = ChatTemplate.load(tmp_path)
    assert (template.render(ONE), template.render(ONE, tools=[])) == ("file", "tool file")


@pytest.mark.parametrize("value", [3, [1], [{"name": "default"}], [{"name": "default", "template": 1}]])
def test_a_chat_template_of_the_wrong_kind_is_named(tmp_path, value):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
    with pytest.raises(CheckpointError, match=r"tokenizer_config.json: chat_template must be"):
        ChatTemplate.load(tmp_path)


@pytest.mark.parametrize(
    "source",
    [
        "{% for %}",
        "{{ x",
        "{{ 1 | center }}",
        "{% include 'x' %}{{ nope(",
        "x" * (MAX_TEMPLATE_CHARS + 1),
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    ],
)
def test_a_broken_template_is_found_when_it_is_loaded(tmp_path, source):
    (tmp_path / "chat_template.jinja").write_text(source)
    with pytest.raises(CheckpointError, match="chat template 'default'"):
        ChatTemplate.load(tmp_path)


# ---------------------------------------------------------------- hostile templates

DOUBLINGS = "{% set ns = namespace(x='ab', y=[1]) %}{% for i in range(60) %}"
SQUARES = "{% set ns = namespace(x='aa') %}{% for i in range(9) %}"
HOSTILE = {
    "loops in loops": "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}",
    "silent loop": "{% for a in range(90000) %}{% for b in range(90000) if false %}{% endfor %}{% endfor %}",
    "long range": "{% for a in range(10**1) %}{{ range(1000000000) | list }}{% endfor %}",
    "huge range": "{{ range(1000000000) | list | length }}",
    "product": "{{ ('a' * 3000000000) | length }}",
    "folded product": "{{ 'a' * 30000 * 30000 * 30000 }}",
    "list product": "{{ ([1] * 3000000000) | length }}",
    "sum doubles": DOUBLINGS + "{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x | length }}",
    "tilde doubles": DOUBLINGS + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x | length }}",
    "join doubles": DOUBLINGS + "{% set ns.x = [ns.x, ns.x] | join %}{% endfor %}{{ ns.x | length }}",
    "method joins squared": SQUARES + "{% set ns.x = ns.x.join(ns.x) %}{% endfor %}{{ ns.x | length }}",
    "filter joins squared": SQUARES + "{% set ns.x = ns.x | list | join(ns.x) %}{% endfor %}{{ ns.x | length }}",
    "capture doubles": DOUBLINGS + "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}",
    "method replaces squared": SQUARES + "{% set ns.x = ns.x.replace('a', ns.x) %}{% endfor %}",
    "filter replaces squared": SQUARES + "{% set ns.x = ns.x | replace('a', ns.x) %}{% endfor %}",
    "nested lists": DOUBLINGS + "{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.y }}",
    "nested dicts": DOUBLINGS + "{% set ns.y = {'a': ns.y, 'b': ns.y} %}{% endfor %}{{ ns.y | tojson }}",
    "nested calls": DOUBLINGS + "{% set ns.y = dict(a=ns.y, b=ns.y) %}{% endfor %}{{ ns.y == ns.y }}",
    "nested spaces": DOUBLINGS + "{% set ns.y = namespace(a=ns.y, b=ns.y) %}{% endfor %}{{ ns.y }}",
    "itself": "{% set ns = namespace() %}{% set ns.x = ns %}{{ ns }}{{ ns | tojson }}",
    "sum of lists": DOUBLINGS + "{% set ns.y = [ns.y, ns.y] | sum(start=[]) %}{% endfor %}{{ ns.y | length }}",
    "big integers": "{% set ns = namespace(x=3) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "powers": "{{ 9 ** 9 ** 9 }}",
    "macro bomb": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "endless macro": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "loop recursion": "{% for a in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "block bomb": "{% block b %}{{ self.b() }}{% endblock %}",
    "padding": "{{ 'a'.center(3000000000) }}",
    "format": "{{ '{:>3000000000}'.format(1) }}",
    "percent": "{{ '%3000000000d' % 1 }}",
    "percent star": "{{ '%*d' % (3000000000, 1) }}",
    "indent": "{{ 'a\nb' | indent(3000000000) }}",
    "json indent": "{{ [1] | tojson(indent=3000000000) }}",
    "batch": "{{ [1] | batch(3000000000, 'x') | list }}",
    "slices": "{{ [1] | slice(3000000000) | list }}",
    "literal text": "{% macro m() %}" + "x" * 50000 + "{% endmacro %}{% for i in range(90000) %}"
    "{% set y = m() %}{% endfor %}",
    "output": "{% for i in range(90000) %}" + "x" * 50000 + "{% endfor %}",
    "time format": "{{ strftime_now('%3000000000d') }}",
    "internals": "{{ ''.__class__.__mro__ }}",
    "internals by filter": "{{ ''|attr('__class__') }}{{ messages.__class__.__init__.__globals__ }}",
    "changes": "{% do messages.append(1) %}{{ messages.append(1) }}",
    "files": "{% include '/etc/hostname' %}",
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_neither_hangs_nor_explodes(name):
    import tracemalloc

    started_s = time.monotonic()
    tracemalloc.start()
    try:
        with pytest.raises((InvalidRequest, CheckpointError)):
            ChatTemplate({"default": HOSTILE[name]}, limits=Limits(1_000_000, 1_000_000, 0.5)).render(
                [{"role": "user", "content": "x" * 1000}]
            )
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 64 * 1024 * 1024
    assert time.monotonic() - started_s < 10  # tracing makes it many times slower than it is


def test_an_ordinary_long_chat_is_far_from_the_limits():
    chat = [{"role": role, "content": "word " * 400} for role in ["user", "assistant"] * 500]
    tight = Limits(max_work=Limits().max_work // 4, max_seconds=60)
    assert len(ChatTemplate({"default": ALTERNATING}, SPECIAL, tight).render(chat)) > 2_000_000
