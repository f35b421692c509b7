"""Grammars of outputs that must call a tool: llguidance accepts calls and nothing else, and the parsers read them."""

import json

import pytest

pytest.importorskip("llguidance")

import llguidance

from twostroke.text.parsing.grammar import free_grammar_of, grammar_of
from twostroke.text.parsing.parser import parse
from twostroke.text.parsing.parsers import CALLS, WHOLE, Parsers
from twostroke.text.parsing.source import Kind
from twostroke.text.parsing.values import Tools

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": CITY}},
    {"type": "function", "function": {"name": "time"}},
]
HERMES = Parsers("hermes", "think")
WEATHER = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
TIME = '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
BYTES = llguidance.LLTokenizer("byte")


def accepts(grammar: str, text: str) -> bool:
    """Whether the whole text is one of the grammar's."""
    matcher = llguidance.LLMatcher(BYTES, llguidance.LLMatcher.grammar_from_lark(grammar))
    assert not matcher.is_error(), matcher.get_error()
    tokens = list(text.encode())
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


def no_special(text: str) -> None:
    return None


def made(name: str | None = None, parsers: Parsers = HERMES, **more: bool) -> str:
    grammar = grammar_of(TOOLS, name, parsers, no_special, **more)
    assert grammar is not None
    return grammar


def test_required_takes_any_calls_and_no_text():
    grammar = made()
    assert accepts(grammar, WEATHER)
    assert accepts(grammar, f"{WEATHER}\n{TIME}")
    assert not accepts(grammar, "It rains.")
    assert not accepts(grammar, "")
    assert not accepts(grammar, WEATHER[:-3])


def test_arguments_conform_to_the_schema():
    assert not accepts(made(), WEATHER.replace('"Oslo"', "7"))
    assert not accepts(made(), WEATHER.replace("city", "town"))
    assert not accepts(made(), WEATHER.replace("weather", "whether"))


def test_a_named_tool_is_the_only_one():
    assert accepts(made("time"), TIME)
    assert not accepts(made("time"), WEATHER)


def test_without_parallel_calls_there_is_one():
    assert accepts(made(parallel=False), WEATHER)
    assert not accepts(made(parallel=False), f"{WEATHER}\n{TIME}")


def test_reasoning_may_come_first_and_must_end_if_the_prompt_began_it():
    assert accepts(made(), f"<think>\nHm, <b>.\n</think>\n\n{WEATHER}")
    assert accepts(made(is_thinking=True), f"Hm.\n</think>\n\n{WEATHER}")
    assert not accepts(made(is_thinking=True), WEATHER)


@pytest.mark.parametrize(
    ("parsers", "text"),
    [
        (HERMES, f"<think>x</think>\n\n{WEATHER}\n{WEATHER}"),
        (Parsers("llama3_json", "none"), '{"name": "weather", "parameters": {"city": "Oslo"}}'),
        (Parsers("mistral", "none"), '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Oslo"}}]'),
        (
            Parsers("harmony", "harmony"),
            "<|channel|>analysis<|message|>x<|end|><|start|>assistant to=functions.weather<|channel|>commentary "
            '<|constrain|>json<|message|>{"city": "Oslo"}',
        ),
    ],
    ids=lambda value: value.tools if isinstance(value, Parsers) else None,
)
def test_what_a_grammar_accepts_the_parser_reads(parsers, text):
    assert accepts(made("weather", parsers), text)
    assert not accepts(made("weather", parsers), "It rains.")
    calls = [event.call for event in parse([text], parsers, "", Tools(TOOLS)) if event.call]
    assert calls
    assert all((call.name, json.loads(call.arguments)) == ("weather", {"city": "Oslo"}) for call in calls)


def test_special_tokens_stand_by_their_ids():
    ids = {"[TOOL_CALLS]": 5, "[ARGS]": 9}
    grammar = grammar_of(TOOLS, "time", Parsers("mistral", "none"), ids.get)
    assert grammar is not None
    assert "call: <[5]> rest" in grammar
    assert 'rest: ("time" <[9]> %json' in grammar


def test_other_formats_have_no_grammar():
    for name in (set(CALLS) | set(WHOLE)) - {"hermes", "llama3_json", "mistral", "harmony", *CALLS_OF}:
        assert grammar_of(TOOLS, None, Parsers(name), no_special) is None
        assert free_grammar_of(TOOLS, frozenset({"weather"}), Parsers(name), no_special) is None


# Arguments for calls in the formats below, which are written as their chat templates print them.
ROUTE = {
    "type": "object",
    "properties": {
        "to": {"type": "string", "description": "A city."},
        "by": {"type": "string", "enum": ["bus", "train"]},
        "seats": {"type": "integer", "minimum": 1, "maximum": 9},
        "stops": {"type": "array", "items": {"$ref": "#/$defs/Stop"}},
        "return": {"type": "boolean"},
        "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    },
    "required": ["to", "seats"],
    "$defs": {"Stop": {"enum": ["Oslo", "Rome"]}},
}
ROUTES = [{"type": "function", "function": {"name": "route", "parameters": ROUTE}}, TOOLS[1]]
GIVEN = {"to": 'Z\u00fcrich\n<b> "x"', "by": "bus", "seats": 2, "stops": ["Rome", "Oslo"], "return": True, "note": None}
FEW = {"to": "", "seats": 9}


def qwen(arguments, name="route"):
    values = "".join(f"<parameter={key}>\n{written(value)}\n</parameter>\n" for key, value in arguments.items())
    return f"<tool_call>\n<function={name}>\n{values}</function>\n</tool_call>"


def glm(arguments, name="route", line="\n"):
    values = "".join(
        f"{line}<arg_key>{key}</arg_key>{line}<arg_value>{written(value)}</arg_value>"
        for key, value in arguments.items()
    )
    return f"<tool_call>{name}{values}{line}</tool_call>"


def written(value):
    return value if isinstance(value, str) else json.dumps(value)


def kimi(*many):
    begin, middle, end = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
    calls = "".join(
        f"{begin}functions.{name}:{place}{middle}{json.dumps(arguments, ensure_ascii=False)}{end}"
        for place, (name, arguments) in enumerate(many)
    )
    return f"<|tool_calls_section_begin|>{calls}<|tool_calls_section_end|>"


def deepseek(*many, is_v3=False):
    begin, separator, end = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
    calls = [
        f"{begin}function{separator}{name}\n```json\n{json.dumps(arguments, ensure_ascii=False)}\n```{end}"
        if is_v3
        else f"{begin}{name}{separator}{json.dumps(arguments, ensure_ascii=False)}{end}"
        for name, arguments in many
    ]
    return f"<｜tool▁calls▁begin｜>{(chr(10) if is_v3 else '').join(calls)}<｜tool▁calls▁end｜>"


CALLS_OF = {
    "qwen3_xml": lambda *many: "\n".join(qwen(arguments, name) for name, arguments in many),
    "glm": lambda *many: "\n".join(glm(arguments, name) for name, arguments in many),
    "kimi_k2": kimi,
    "deepseek": deepseek,
}


def read(text, parsers, tools=ROUTES):
    """Names and arguments of the calls in a text; nothing else may be in it but marks."""
    events = list(parse([text], parsers, "", Tools(tools)))
    assert not "".join(event.text for event in events if event.kind is Kind.CONTENT).strip()
    return [(event.call.name, json.loads(event.call.arguments)) for event in events if event.call]


@pytest.mark.parametrize("name", CALLS_OF)
def test_calls_of_further_formats_are_accepted_and_read(name):
    grammar = grammar_of(ROUTES, None, Parsers(name), no_special)
    assert grammar is not None
    for calls in (
        [("route", GIVEN)],
        [("route", FEW)],
        [("time", {})],
        [("route", FEW), ("time", {}), ("route", GIVEN)],
    ):
        text = CALLS_OF[name](*calls)
        assert accepts(grammar, text), text
        assert read(text, Parsers(name)) == calls
    alone = grammar_of(ROUTES, None, Parsers(name), no_special, parallel=False)
    assert alone is not None
    assert accepts(alone, CALLS_OF[name](("route", FEW)))
    assert not accepts(alone, CALLS_OF[name](("route", FEW), ("time", {})))


@pytest.mark.parametrize("name", CALLS_OF)
def test_calls_of_further_formats_conform_to_their_schemas(name):
    grammar = grammar_of(ROUTES, None, Parsers(name), no_special)
    assert grammar is not None
    for wrong in (
        {"seats": 2},
        {"to": "x", "seats": 10},
        {"to": "x", "seats": "two"},
        FEW | {"by": "car"},
        FEW | {"stops": ["Paris"]},
        FEW | {"return": "perhaps"},
        FEW | {"more": 1},
    ):
        accepted = accepts(grammar, CALLS_OF[name](("route", wrong)))
        assert accepted == (name in ("kimi_k2", "deepseek") and "more" in wrong), (
            wrong
        )  # JSON Schema allows more members
    assert not accepts(grammar, CALLS_OF[name](("whither", FEW)))
    assert not accepts(grammar, "It rains.")
    assert not accepts(grammar, CALLS_OF[name](("route", FEW))[:-3])


def test_other_ways_to_write_a_call_are_accepted():
    for name, text in (("glm", glm(FEW, line="")), ("deepseek", deepseek(("route", FEW), ("route", FEW), is_v3=True))):
        grammar = grammar_of(ROUTES, None, Parsers(name), no_special)
        assert grammar is not None
        assert accepts(grammar, text), text
        assert read(text, Parsers(name))[0] == ("route", FEW)


def test_a_tool_without_a_list_of_its_arguments_takes_any():
    tools = [{"type": "function", "function": {"name": "route", "parameters": {"type": "object"}}}]
    for name, calls in CALLS_OF.items():
        grammar = grammar_of(tools, None, Parsers(name), no_special)
        assert grammar is not None
        assert accepts(grammar, calls(("route", {"to": "x", "seats": 3})))
        assert accepts(grammar, calls(("route", {})))


def test_strict_holds_where_the_format_can_say_the_whole_schema():
    exact = {**ROUTE, "properties": {key: value for key, value in ROUTE["properties"].items() if key != "note"}}
    tools = [{"type": "function", "function": {"name": "route", "parameters": exact}}, TOOLS[1]]
    for name in ("glm", "kimi_k2", "deepseek"):
        grammar = free_grammar_of(tools, frozenset({"route"}), Parsers(name), no_special)
        assert grammar is not None
        assert accepts(grammar, f"Let me see.\n{CALLS_OF[name](('route', FEW))}")
        assert accepts(grammar, "It rains.")
        assert accepts(grammar, CALLS_OF[name](("time", {"zone": "x"})))
        assert not accepts(grammar, f"Let me see.\n{CALLS_OF[name](('route', FEW | {'by': 'car'}))}")
    assert free_grammar_of(ROUTES, frozenset({"route"}), Parsers("glm"), no_special) is None, "note may be any text"
    narrow = {"type": "object", "properties": {"to": {"type": "string", "pattern": "[a-z]+"}}}
    tools = [{"type": "function", "function": {"name": "route", "parameters": narrow}}]
    assert free_grammar_of(tools, frozenset({"route"}), Parsers("glm"), no_special) is None, "the pattern is not held"
    assert free_grammar_of(tools, frozenset(), Parsers("glm"), no_special) is not None
    assert free_grammar_of(TOOLS, frozenset({"weather"}), Parsers("qwen3_xml"), no_special) is None, (
        "<function= begins one"
    )


def test_a_model_with_the_markup_of_later_deepseeks_is_not_made_to_write_the_older_calls():
    assert grammar_of(TOOLS, None, Parsers("deepseek"), {"｜DSML｜": 7}.get) is None


def test_references_of_a_schema_count_from_its_own_root():
    schema = {
        "type": "object",
        "properties": {"place": {"$ref": "#/$defs/Place"}},
        "required": ["place"],
        "$defs": {"Place": {"type": "string", "enum": ["Oslo", "Rome"]}},
    }
    tools = [{"type": "function", "function": {"name": "weather", "parameters": schema}}]
    for name, begin, end in (
        ("hermes", '<tool_call>\n{"name": "weather", "arguments": ', "}\n</tool_call>"),
        ("llama3_json", '{"name": "weather", "parameters": ', "}"),
        ("mistral", '[TOOL_CALLS] [{"name": "weather", "arguments": ', "}]"),
    ):
        grammar = grammar_of(tools, None, Parsers(name, "none"), no_special)
        assert grammar is not None
        assert accepts(grammar, begin + '{"place": "Rome"}' + end)
        assert not accepts(grammar, begin + '{"place": "Paris"}' + end)


def test_a_tool_without_parameters_takes_none():
    assert not accepts(made("time"), TIME.replace("{}", '{"zone": 1}'))


def test_strict_leaves_text_free_and_holds_the_schemas_of_strict_tools():
    grammar = free_grammar_of(TOOLS, frozenset({"weather"}), HERMES, no_special)
    assert grammar is not None
    for text in (
        "",
        "It rains.",
        "a < b",
        WEATHER,
        f"Let me see.\n{WEATHER}\n{TIME}\nSo.",
        f"<think>x</think>\n{WEATHER}",
    ):
        assert accepts(grammar, text), text
    assert accepts(grammar, TIME.replace("{}", '{"zone": 1}'))
    assert not accepts(grammar, WEATHER.replace('"Oslo"', "7"))
    assert not accepts(grammar, f"Well: {WEATHER.replace('weather', 'whether')}")
    assert not accepts(grammar, f"{WEATHER}\n<tool_call>\nno call")


def test_strict_holds_behind_reasoning_that_the_prompt_began():
    grammar = free_grammar_of(TOOLS, frozenset({"weather"}), HERMES, no_special, is_thinking=True)
    assert grammar is not None
    assert accepts(grammar, f"Hm.\n</think>\n\n{WEATHER}")
    assert accepts(grammar, "Hm.\n</think>\n\nIt rains.")
    assert not accepts(grammar, f"Hm.\n</think>\n\n{WEATHER.replace('city', 'town')}")


def test_text_alone_marks_no_call_where_calls_have_no_opener():
    for name in ("llama3_json", "harmony"):
        assert free_grammar_of(TOOLS, frozenset({"weather"}), Parsers(name, "none"), no_special) is None
