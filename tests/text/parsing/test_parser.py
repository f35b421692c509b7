"""Properties of all parsers: nothing is lost, cuts do not matter, nothing raises, and work stays bounded per piece."""

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twostroke.core.errors import ConfigError
from twostroke.text.parsing.parser import OutputParser, parse
from twostroke.text.parsing.parsers import CALLS, REASONING_PARSERS, TOOL_PARSERS, WHOLE, Parsers, parsers_of
from twostroke.text.parsing.scan import MAX_DEPTH
from twostroke.text.parsing.source import Event, Kind
from twostroke.text.parsing.values import Tools

TOOLS = Tools(
    [
        {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "string"}}}}},
        {"type": "function", "function": {"name": "g"}},
    ]
)
ALL = [
    *(Parsers(name, "think") for name in CALLS),
    *(Parsers(name, name) for name in WHOLE),
    Parsers("mistral", "mistral"),
    Parsers("gemma4", "gemma4"),
]
WORDS = sorted(
    {word for parsers in ALL for word in parsers.words}
    | {"</tool_call>", "<function=f>", "<parameter=a>", "</parameter>", "</function>", "</arg_key>", "</arg_value>"}
    | {
        '{"name": "f", "arguments": {"a": "x"}}',
        '{"a": 1}',
        "call:f{",
        "}",
        "[f(a='x'",
        ")]",
        "f",
        "\n",
        " ",
        "\\",
        '"',
    }
    | {
        "<｜tool▁call▁end｜>",
        "<｜tool▁calls▁end｜>",
        '<｜DSML｜invoke name="f">',
        "</｜DSML｜invoke>",
        "```json",
        "[",
        "]",
    }
    | {
        'call tool="f" index="1"',
        "argument ",
        'key="a" type="string"',
        " to=functions.f",
        "analysis",
        "final",
        "functions.f:0",
    }
)
OUTPUTS = st.lists(st.one_of(st.sampled_from(WORDS), st.text(max_size=6)), max_size=14).map("".join)


def told(events: list[Event]) -> tuple[str, str, list[tuple[str, str]]]:
    """Content, reasoning and calls."""
    content = "".join(event.text for event in events if event.kind is Kind.CONTENT)
    reasoning = "".join(event.text for event in events if event.kind is Kind.REASONING)
    return content, reasoning, [(event.call.name, event.call.arguments) for event in events if event.call]


@pytest.mark.parametrize("parsers", ALL, ids=str)
@given(
    text=OUTPUTS,
    cuts=st.lists(st.integers(0, 200), max_size=20),
    prompt_end=st.sampled_from(("", "<think>\n", "</think>")),
)
@settings(max_examples=150, deadline=None)
def test_no_output_is_lost_raises_or_depends_on_how_it_was_cut(parsers, text, cuts, prompt_end):
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[start:end] for start, end in itertools.pairwise(places)]
    for tools in (TOOLS, None):
        whole = parse([text], parsers, prompt_end, tools)
        assert "".join(event.raw for event in whole) == text
        assert told(parse(pieces, parsers, prompt_end, tools)) == told(whole)
        assert told(parse(text, parsers, prompt_end, tools)) == told(whole)
        assert all(isinstance(json.loads(event.call.arguments), dict) for event in whole if event.call)
        assert tools is not None or not any(event.call for event in whole)


@pytest.mark.parametrize("parsers", ALL, ids=str)
def test_text_without_markers_comes_at_once_and_unchanged(parsers):
    if parsers.tools in WHOLE:
        pytest.skip("every output of this format has markers")
    parser = OutputParser(parsers, tools=TOOLS)
    assert told(parser.push("Hello, world."))[0] == "Hello, world."
    assert told(parser.push(" 1 < 2"))[0].startswith(" 1")
    assert told(parser.finish())[1:] == ("", [])


HOSTILE = {
    "deep lists": "[" * 5_000,
    "deep objects": '{"a":' * 5_000,
    "spaces": " " * 20_000,
    "line ends": "\n" * 20_000,
    "openers": "<tool_call>" * 2_000,
    "half openers": "<tool_cal" * 2_000,
    "braces": "{}" * 5_000,
    "quotes": '"' * 10_000,
    "backslashes": "\\" * 10_000,
    "words": "x" * 20_000,
    "attributes": 'a="' * 5_000,
    "digits": "1" * 20_000,
}
BEGINNINGS = {
    "hermes": '<tool_call>{"name": "f", "arguments": {"a": "',
    "qwen3_xml": "<tool_call>\n<function=f>\n<parameter=a>\n",
    "glm": "<tool_call>f<arg_key>a</arg_key><arg_value>",
    "deepseek": '<｜DSML｜tool_calls><｜DSML｜invoke name="f"><｜DSML｜parameter name="a" string="false">',
    "kimi_k2": "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>",
    "mistral": '[TOOL_CALLS]f[ARGS]{"a": ',
    "llama3_json": '{"name": "f", "parameters": {"a": ',
    "llama4_pythonic": "[f(a=",
    "gemma4": "<|tool_call>call:f{a:",
    "harmony": "<|channel|>commentary to=functions.f<|message|>",
    "kimi_k3": '<|open|>call tool="f" index="1"<|sep|><|open|>argument key="a" type="json"<|sep|>',
}


@pytest.mark.parametrize("name", [*CALLS, *WHOLE])
@pytest.mark.parametrize("begins", [True, False], ids=["in a call", "in text"])
def test_a_hostile_output_leaves_little_to_read_again_with_every_piece(name: str, begins: bool):
    parsers = Parsers(name, name if name in WHOLE else "think")
    for text in HOSTILE.values():
        parser = OutputParser(parsers, tools=TOOLS)
        events = parser.push(BEGINNINGS[name] if begins else "")
        most = 0
        for piece in text:
            events += parser.push(piece)
            most = max(most, parser.num_unread)
        events += parser.finish()
        assert most < 200
        assert "".join(event.raw for event in events) == (BEGINNINGS[name] if begins else "") + text


def test_a_megabyte_of_arguments_is_one_call():
    text = '<tool_call>{"name": "f", "arguments": {"a": "' + "\\n" * 500_000 + '"}}</tool_call>'
    pieces = [text[at : at + 7] for at in range(0, len(text), 7)]
    (call,) = [event.call for event in parse(pieces, Parsers("hermes"), tools=TOOLS) if event.call]
    assert json.loads(call.arguments) == {"a": "\n" * 500_000}


def test_arguments_that_nest_too_deeply_are_no_call():
    deep = '{"a":' * (MAX_DEPTH + 1) + "1" + "}" * (MAX_DEPTH + 1)
    text = '<tool_call>{"name": "f", "arguments": ' + deep + "}</tool_call>"
    content, _, calls = told(parse([text], Parsers("hermes"), tools=TOOLS))
    assert not calls
    assert content == text


def test_calls_stay_content_if_no_tools_are_offered():
    text = 'Hi <tool_call>{"name": "f", "arguments": {}}</tool_call>'
    assert told(parse([text], Parsers("hermes", "think"))) == (text, "", [])


def test_a_malformed_call_is_content_as_it_was_written():
    text = "before <tool_call>no call</tool_call> after"
    assert told(parse(text, Parsers("hermes"), tools=TOOLS)) == (text, "", [])


def test_a_call_that_never_ends_is_shown_to_nobody_only_if_the_output_was_cut():
    text = 'before <tool_call>{"name": "f"'
    assert told(parse(text, Parsers("hermes"), tools=TOOLS)) == (text, "", [])
    assert told(parse(text, Parsers("hermes"), tools=TOOLS, is_cut=True)) == ("before", "", [])


def test_reasoning_that_the_prompt_began_ends_with_its_tag():
    events = parse(["I see.\n</think>\n\nYes."], Parsers("hermes", "think"), "<think>\n", TOOLS)
    assert told(events) == ("Yes.", "I see.", [])


HARMONY = Parsers("harmony", "harmony")


@pytest.mark.parametrize("text", ['{"a": 1', "yes", " \n[1, 2", "12", "Alas, a final answer"])
def test_an_answer_that_a_rule_asks_of_harmony_streams_without_a_header(text: str):
    parser = OutputParser(HARMONY, "<|start|>assistant", TOOLS)
    told_so_far = told(parser.push(text[:-1]))[0] + told(parser.push(text[-1]))[0]
    assert told_so_far.strip() == text.strip()  # at once, and so also if it is cut
    assert told_so_far + told(parser.finish(is_cut=True))[0] == text


def test_a_harmony_prompt_that_ends_within_reasoning_goes_on_there():
    begun = "<|start|>assistant<|channel|>analysis<|message|>"
    output = "I see.<|end|><|start|>assistant<|channel|>final<|message|>Yes."
    assert told(parse([output], HARMONY, begun, TOOLS)) == ("Yes.", "I see.", [])


@pytest.mark.parametrize("before", ["", " ", "assistant", "analysis"])
def test_headers_of_harmony_may_lack_their_first_tag(before: str):
    header = "<|message|>" if before == "analysis" else "<|channel|>analysis<|message|>"
    call = "<|end|><|start|>assistant to=functions.f<|channel|>commentary<|message|>{}<|call|>"
    assert told(parse([before + header + "Hm." + call], HARMONY, "", TOOLS)) == ("", "Hm.", [("f", "{}")])


def test_reasoning_stays_content_without_its_parser():
    events = parse(["<think>I see.</think>Yes."], Parsers("hermes", "none"), "", TOOLS)
    assert told(events) == ("<think>I see.</think>Yes.", "", [])


@pytest.mark.parametrize(
    ("template", "found"),
    [
        ("{{ '<tool_call>' }} arguments </think>", Parsers("hermes", "think")),
        ("<tool_call> <function= <parameter= </think>", Parsers("qwen3_xml", "think")),
        ("<arg_key> <arg_value> <tool_call>", Parsers("glm", "none")),
        ("<|start|> <|channel|> <|message|>", Parsers("harmony", "harmony")),
        ("[TOOL_CALLS]", Parsers("mistral", "none")),
        ("[TOOL_CALLS] [THINK]", Parsers("mistral", "mistral")),
        ("<|im_start|>", Parsers("none", "none")),
        (None, Parsers("none", "none")),
    ],
)
def test_the_template_tells_the_parsers(template, found):
    assert parsers_of(template) == found


def test_names_override_what_the_template_tells():
    assert parsers_of("<tool_call> </think>", "glm", "none") == Parsers("glm", "none")
    assert parsers_of(None, "harmony") == Parsers("harmony", "harmony")


def test_an_unknown_parser_is_refused_with_the_list():
    with pytest.raises(ConfigError, match=r"router.tool_parser is 'hermse'; must be one of auto, none, hermes"):
        parsers_of(None, "hermse")
    with pytest.raises(ConfigError, match=r"router.reasoning_parser is 'x'; must be one of auto, none, think"):
        parsers_of(None, "auto", "x")
    assert {"auto", "none"} <= set(TOOL_PARSERS) & set(REASONING_PARSERS)


def test_parsers_that_do_not_go_together_are_refused():
    with pytest.raises(ConfigError, match="harmony is a grammar of the whole output"):
        parsers_of(None, "harmony", "think")


@pytest.mark.parametrize(
    ("given", "served"),
    [
        (("qwen3_coder", "none"), ("qwen3_xml", "none")),
        (("glm45", "glm45"), ("glm", "think")),
        (("openai", "openai_gptoss"), ("harmony", "harmony")),
        (("deepseek_v3", "deepseek_r1"), ("deepseek", "think")),
        (("pythonic", "auto"), ("llama4_pythonic", "none")),
    ],
)
def test_names_of_other_servers_mean_the_same_formats(given, served):
    assert parsers_of(None, *given) == served
