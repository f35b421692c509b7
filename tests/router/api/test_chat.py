"""Chats under templates in the styles of the families: as transformers renders them, and nothing vanishes unsaid."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import tokenizers
from support.checkpoints.real_models import real_models
from support.checkpoints.template_styles import SPECIAL, STYLES
from tokenizers import models

from twostroke.core.errors import InvalidRequest, UnsupportedParameter
from twostroke.router.api.call import GenerateCall
from twostroke.router.api.chat import MAX_KWARGS, chat_prompt
from twostroke.router.api.ignored import Ignored
from twostroke.router.api.models import ServedModel
from twostroke.text.templates.template import ChatTemplate
from twostroke.text.tokenizer import Tokenizer


def template_of(source: str) -> ChatTemplate:
    return ChatTemplate({"default": source}, SPECIAL)


TEMPLATES = {name: template_of(source) for name, source in STYLES.items()}
TOKENIZER = Tokenizer(tokenizers.Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}, "<s>")), SPECIAL, ())


def prompt(template: ChatTemplate | str, messages: list[Any], **more: Any) -> tuple[str, tuple[str, ...]]:
    """The prompt, and the names of what has no effect on it."""
    found, ignored = TEMPLATES[template] if isinstance(template, str) else template, Ignored()
    model = ServedModel("m", 64, 2, TOKENIZER, found, None)  # type: ignore[arg-type]  # no texts of tokens needed
    return chat_prompt(GenerateCall(messages=messages, **more), model, ignored).text, ignored.names()


def refusal(template: ChatTemplate | str, messages: list[Any], **more: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        prompt(template, messages, **more)
    return caught.value


def transformers_prompt(source: str, messages: list[Any], **more: Any) -> str:
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_object=TOKENIZER.backend, **SPECIAL)
    theirs.chat_template = source
    arguments = {"add_generation_prompt": True} | more
    return str(theirs.apply_chat_template(messages, tokenize=False, **arguments))


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def call(value: str, id_: str = "call12345") -> dict[str, Any]:
    return {"id": id_, "type": "function", "function": {"name": "look", "arguments": json.dumps({"key": value})}}


def result(content: Any, id_: str = "call12345") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": id_, "content": content}


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


SYSTEM, DEVELOPER = {"role": "system", "content": "TEXT-A"}, {"role": "developer", "content": "TEXT-B"}
SHAPES: dict[str, list[dict[str, Any]]] = {
    "one turn": [user("TEXT-A")],
    "system": [SYSTEM, user("TEXT-B")],
    "developer": [DEVELOPER, user("TEXT-C")],
    "system and developer": [SYSTEM, DEVELOPER, user("TEXT-C")],
    "turns": [SYSTEM, user("TEXT-B"), assistant("TEXT-C"), user("TEXT-D")],
    "late developer": [SYSTEM, user("TEXT-C"), assistant("TEXT-D"), DEVELOPER, user("TEXT-E")],
    "parts": [{"role": "system", "content": parts("TEXT-A", "TEXT-B")}, user(parts("TEXT-C", "TEXT-D"))],
    "parts of an answer": [user("TEXT-A"), assistant(parts("TEXT-B", "TEXT-C")), user("TEXT-D")],
    "calls beside null": [user("TEXT-A"), assistant(None, tool_calls=[call("TEXT-B")]), result("TEXT-C")],
    "calls beside an empty text": [user("TEXT-A"), assistant("", tool_calls=[call("TEXT-B")]), result(parts("TEXT-C"))],
    "calls beside a text": [user("TEXT-A"), assistant("TEXT-B", tool_calls=[call("TEXT-C")]), result("TEXT-D")],
    "two calls": [
        user("TEXT-A"),
        assistant(None, tool_calls=[call("TEXT-B"), call("TEXT-C", "call54321")]),
        result("TEXT-D"),
        result("TEXT-E", "call54321"),
    ],
    "an older call": [
        user("TEXT-A"),
        assistant(None, function_call=call("TEXT-B")["function"]),
        {"role": "function", "name": "look", "content": "TEXT-C"},
    ],
    "reasoning": [user("TEXT-A"), assistant("TEXT-B", reasoning_content="why"), user("TEXT-C")],
}


def check_nothing_vanishes(template: ChatTemplate, where: str) -> tuple[int, int]:
    """Every text of every shape is in the prompt, or the message is refused, or its field is named. Counts both."""
    shown = refused = 0
    for name, shape in SHAPES.items():
        try:
            text, ignored = prompt(template, shape)
        except InvalidRequest:
            refused += 1
            continue
        shown += 1
        lost = [marker for marker in re.findall(r"TEXT-\w", json.dumps(shape)) if marker not in text]
        assert not lost or "messages.content" in ignored, f"{where}: {name} lost {lost}"
    return shown, refused


@pytest.mark.parametrize(
    ("ids", "named"), [(("call12345", "call54321"), False), (("call54321", "call12345"), True), (("call12345",), False)]
)
def test_an_id_that_the_template_leaves_out_is_named_where_the_order_tells_another(ids, named):
    calls = assistant(None, tool_calls=[call("a"), call("b", "call54321")])
    _, ignored = prompt("json_calls", [user("x"), calls, *(result("y", id_) for id_ in ids)])
    assert ("messages.tool_call_id" in ignored) == named


@pytest.mark.parametrize("style", STYLES)
def test_nothing_vanishes_in_silence(style):
    shown, refused = check_nothing_vanishes(TEMPLATES[style], style)
    assert shown + refused == len(SHAPES)
    assert shown >= 3


@pytest.mark.timeout(240)  # the first one fetches 77 MB
def test_nothing_vanishes_in_silence_under_real_templates():
    counts = {
        path.stem: check_nothing_vanishes(template_of(path.read_bytes().decode()), path.stem)
        for path in sorted(real_models().glob("*.jinja"))
    }
    assert len(counts) >= 60
    all_shown = {name for name, (_, refused) in counts.items() if refused == 0}
    assert all_shown >= {"Qwen-Qwen2.5-7B-Instruct", "Qwen-Qwen3-0.6B", "GLM-4.6", "deepseek-ai-DeepSeek-V3.1"}
    assert sum(refused == len(SHAPES) for _, refused in counts.values()) <= 5  # those that want tools


def as_transformers_has_it(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same chat for `apply_chat_template`, which takes arguments as objects."""
    found: list[dict[str, Any]] = json.loads(json.dumps(messages))
    for one in (one for message in found for one in message.get("tool_calls", ())):
        one["function"]["arguments"] = json.loads(one["function"]["arguments"])
    return found


# Shapes that transformers renders whole, by style; elsewhere it loses text, prints an object or raises.
AS_IN_TRANSFORMERS = [
    *((style, "one turn") for style in STYLES if style not in ("parts", "first_part")),
    *((style, "turns") for style in STYLES if style not in ("no_system", "parts", "first_part")),
    *((style, "calls beside an empty text") for style in ("strict", "developer")),
    *((style, "calls beside null") for style in ("json_calls", "one_call", "strict", "developer", "either")),
    *((style, "two calls") for style in ("json_calls", "strict", "either")),
    *((style, "calls beside a text") for style in ("json_calls", "one_call", "strict", "developer", "either")),
    *((style, "reasoning") for style in STYLES if style not in ("parts", "first_part")),
    *((style, "parts") for style in ("parts", "either")),
    *((style, "parts of an answer") for style in ("either",)),
    ("developer", "developer"),
]


@pytest.mark.parametrize(("style", "shape"), AS_IN_TRANSFORMERS)
def test_renders_as_transformers_does(style, shape):
    messages = [
        message | ({"content": message["content"][0]["text"]} if message["role"] == "tool" else {})
        if isinstance(message["content"], list) and shape == "calls beside an empty text"
        else message
        for message in as_transformers_has_it(SHAPES[shape])
    ]
    assert prompt(style, SHAPES[shape])[0] == transformers_prompt(STYLES[style], messages)


# ---------------------------------------------------------------- what is done for templates that cannot


def test_a_developer_message_counts_as_system_where_nobody_knows_it():
    for style in ("turns", "json_calls", "one_call", "strict", "text_calls", "silent", "parts"):
        as_system = prompt(style, [{**DEVELOPER, "role": "system"}, user("x")])
        assert prompt(style, [DEVELOPER, user("x")]) == as_system
    assert "<|developer|>TEXT-B" in prompt("developer", [DEVELOPER, user("x")])[0]
    assert "System role not supported" in refusal("no_system", [DEVELOPER, user("x")]).message


def test_leading_system_messages_become_one_where_only_one_is_taken():
    for style in ("strict", "text_calls", "developer"):
        merged = prompt(style, [{"role": "system", "content": "TEXT-A\n\nTEXT-B"}, user("x")])
        assert prompt(style, [SYSTEM, DEVELOPER, user("x")]) == merged
        assert prompt(style, [SYSTEM, {**DEVELOPER, "content": parts("TEXT-B")}, user("x")]) == merged
    assert prompt("turns", [SYSTEM, SYSTEM, user("x")])[0].count("<turn>system") == 2


def test_a_late_system_message_is_refused_where_one_of_them_would_be_left_out():
    for style in ("text_calls", "developer"):
        assert refusal(style, SHAPES["late developer"]).param == "messages[3].role"
    assert "no role system after" in refusal("strict", SHAPES["late developer"]).message


def test_a_role_that_the_template_leaves_out_is_refused():
    error = refusal("silent", [user("x"), assistant("y"), result("z")])
    assert (error.param, "leaves such messages out" in error.message) == ("messages[2].role", True)


def test_calls_that_no_template_shows_are_refused():
    for style in ("turns", "silent", "parts"):
        error = refusal(style, [user("x"), assistant("y", tool_calls=[call("z")]), user("x")])
        assert error.param == "messages[1].tool_calls"
    # Only beside null does this one show them.
    assert refusal("text_calls", SHAPES["calls beside a text"]).param == "messages[1].tool_calls"
    assert refusal("developer", SHAPES["two calls"]).param == "messages[1].tool_calls"


def test_arguments_are_objects_or_text_as_the_template_prints_them():
    messages = [user("x"), assistant(None, tool_calls=[call("ü")]), result("y")]
    assert '"arguments": {"key": "ü"}}' in prompt("json_calls", messages)[0]
    assert '<C>look\n{"key": "ü"}<R>y' in prompt("text_calls", messages)[0]
    broken = {**call(""), "function": {"name": "look", "arguments": '{"key": '}}
    assert '"{\\"key\\": "' in prompt("json_calls", [user("x"), assistant(None, tool_calls=[broken]), result("y")])[0]


def test_content_beside_calls_is_as_the_template_wants_it():
    for content in (None, ""):
        messages = [user("x"), assistant(content, tool_calls=[call("y")]), result("z")]
        for style in ("json_calls", "one_call", "strict", "text_calls", "developer", "either"):
            text = prompt(style, messages)[0]
            assert "y" in text
            assert "None" not in text


def test_parts_are_lines_where_text_is_wanted_and_text_is_a_part_where_parts_are():
    two = [user(parts("one", "two"))]
    assert "user\none\ntwo</turn>" in prompt("json_calls", two)[0]
    assert "<user>onetwo</>" in prompt("parts", two)[0]
    assert "<user>onetwo</>" in prompt("either", two)[0]
    assert "<user>one\ntwo</>" in prompt("first_part", two)[0]
    for style in ("parts", "either", "first_part"):
        assert "<user>one</>" in prompt(style, [user("one")])[0]


# ---------------------------------------------------------------- what is told


def test_fields_that_the_template_does_not_read_are_named():
    messages = [{**user("x"), "name": "ann", "agent": "build"}, assistant("y", reasoning="why", wait=True), user("z")]
    assert prompt("turns", messages)[1] == (
        "messages.name",
        "messages.agent",
        "messages.wait",
        "messages.reasoning_content",
    )
    assert prompt("json_calls", messages)[1] == ("messages.name", "messages.agent", "messages.wait")
    reads_name = STYLES["turns"].replace("m['content']", "m['content'] ~ m.get('name', '')")
    text, ignored = prompt(template_of(reads_name), messages)
    assert "x" + "ann" in text
    assert "messages.name" not in ignored


def test_a_template_that_reads_whole_messages_ignores_nothing():
    source = "{% for m in messages %}{{ m | tojson }}{% endfor %}{{ messages | list | length }}"
    text, ignored = prompt(template_of(source), [{**user("x"), "agent": "build"}])
    assert (text, ignored) == ('{"role": "user", "content": "x", "agent": "build"}1', ())
    for reading in ("{% for k in m %}{{ k }}{% endfor %}", "{{ m }}", "{{ dict(m) }}", "{{ m.values() | list }}"):
        found = prompt(template_of("{% for m in messages %}" + reading + "{% endfor %}"), [{**user("x"), "agent": "b"}])
        assert "messages.agent" not in found[1]


def test_a_template_of_one_turn_takes_several_and_names_what_it_leaves_out():
    template = template_of("{{ messages[-1].content }}")
    assert prompt(template, [user("x")]) == ("x", ())
    assert prompt(template, [user("x"), assistant("y"), user("z")]) == ("z", ("messages.content",))


def test_looking_for_a_message_does_not_read_it():
    source = "{% for m in messages | selectattr('role', 'equalto', 'user') | list %}{{ m.content }}{% endfor %}"
    assert prompt(template_of(source), [{**user("x"), "agent": "b"}]) == ("x", ("messages.agent",))


def test_asking_whether_a_field_is_there_reads_it():
    source = "{% for m in messages %}{{ m.content }}{% if 'wait' in m %}...{% endif %}{% endfor %}"
    assert prompt(template_of(source), [{**user("x"), "wait": True, "go": True}]) == ("x...", ("messages.go",))


def test_text_beside_calls_that_the_template_leaves_out_is_named():
    for style, lost in (("one_call", True), ("strict", True), ("json_calls", False)):
        assert ("messages.content" in prompt(style, SHAPES["calls beside a text"])[1]) is lost


def test_reasoning_reaches_templates_that_know_it_by_one_name_only():
    for name in ("reasoning_content", "thinking", "reasoning"):
        source = (
            "{% for m in messages %}{{ m.content }}{% if m." + name + " %}[{{ m." + name + " }}]{% endif %}{% endfor %}"
        )
        for given in ("reasoning_content", "thinking", "reasoning"):
            assert prompt(template_of(source), [user("x"), assistant("y", **{given: "why"})]) == ("xy[why]", ())


# ---------------------------------------------------------------- what goes with the messages


def test_chat_template_kwargs_reach_the_template_and_others_are_named():
    thinking, silent = (
        prompt("json_calls", [user("x")], chat_template_kwargs={"enable_thinking": t, "other": 1})
        for t in (True, False)
    )
    assert (thinking[0].endswith("<think></think>"), silent[0].endswith("<think></think>")) == (False, True)
    assert silent[1] == ("chat_template_kwargs.other",)
    expected = transformers_prompt(STYLES["json_calls"], [user("x")], enable_thinking=False)
    assert silent[0] == expected


@pytest.mark.parametrize(
    "name",
    [
        *("messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template"),
        *(
            "bos_token",
            "eos_token",
            "pad_token",
            "raise_exception",
            "namespace",
            "range",
            "strftime_now",
            "self",
            "loop",
        ),
        *("_private", "__class__", "a b", "", "ü", "x" * 65, "metered tick"),
    ],
)
def test_chat_template_kwargs_hide_nothing(name):
    error = refusal("turns", [user("x")], chat_template_kwargs={name: 1})
    assert str(error.param).startswith("chat_template_kwargs.")
    assert len(error.message) < 250


def test_chat_template_kwargs_are_bounded():
    nested: Any = 1
    for _ in range(17):
        nested = [nested]
    for wrong in ({f"k{n}": 1 for n in range(MAX_KWARGS + 1)}, {"a": nested}, [1], "x"):
        assert refusal("turns", [user("x")], chat_template_kwargs=wrong).param == "chat_template_kwargs"


def test_reasoning_effort_reaches_the_templates_that_read_it():
    assert prompt("developer", [user("x")], reasoning_effort="high")[0].startswith("effort: high")
    assert prompt("json_calls", [user("x")], reasoning_effort="none")[0].endswith("<think></think>")
    assert not prompt("json_calls", [user("x")], reasoning_effort="low")[0].endswith("<think></think>")
    asked = {"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}}
    assert not prompt("json_calls", [user("x")], **asked)[0].endswith("<think></think>")
    assert prompt("turns", [user("x")], reasoning_effort="high")[1] == ("reasoning_effort",)
    for wrong in ("a lot", 3, ["high"]):
        assert refusal("developer", [user("x")], reasoning_effort=wrong).param == "reasoning_effort"
    both = {"reasoning_effort": "low", "chat_template_kwargs": {"reasoning_effort": "high"}}
    assert refusal("developer", [user("x")], **both).param == "reasoning_effort"


def test_documents_reach_the_template_or_are_refused():
    source = "{% for d in documents %}[{{ d.title }}: {{ d.text }}]{% endfor %}{{ messages[0].content }}"
    documents = [{"title": "t", "text": "x"}]
    assert prompt(template_of(source), [user("q")], documents=documents)[0] == "[t: x]q"
    error = refusal("turns", [user("q")], documents=documents)
    assert isinstance(error, UnsupportedParameter)
    assert error.param == "documents"
    for wrong in ([1], "x", [{}] * 1025):
        assert refusal(template_of(source), [user("q")], documents=wrong).param == "documents"


CONTINUED = [user("q"), assistant("  It is ")]


@pytest.mark.parametrize("style", ["turns", "json_calls", "one_call", "strict", "text_calls", "no_system", "either"])
def test_a_last_message_is_continued_as_transformers_does_it(style):
    expected = transformers_prompt(STYLES[style], CONTINUED, continue_final_message=True, add_generation_prompt=False)
    for more in ({}, {"add_generation_prompt": False}):
        assert prompt(style, CONTINUED, continue_final_message=True, **more)[0] == expected
    assert expected.rstrip().endswith("It is")


def test_parts_are_continued_after_the_last_one():
    messages = [user("q"), assistant(parts("It", " is "))]
    for style in ("parts", "either"):
        assert prompt(style, messages, continue_final_message=True)[0].endswith("<assistant>It is ")
    assert prompt("turns", messages, continue_final_message=True)[0].endswith("assistant\nIt\n is ")


def test_what_cannot_be_continued_is_refused():
    both = {"continue_final_message": True, "add_generation_prompt": True}
    assert refusal("turns", CONTINUED, **both).param == "continue_final_message"
    nothing = [user("q"), assistant(None, tool_calls=[call("x")])]
    assert refusal("json_calls", nothing, continue_final_message=True).param == "continue_final_message"
    hiding = template_of("{% for m in messages %}{{ m.role }}{{ m.content | length }}{% endfor %}")
    assert refusal(hiding, CONTINUED, continue_final_message=True).param == "continue_final_message"
    for name in ("continue_final_message", "add_generation_prompt"):
        assert refusal("turns", CONTINUED, **{name: "yes"}).param == name


def test_the_prompt_of_an_answer_can_be_left_out():
    assert prompt("turns", [user("x")], add_generation_prompt=False)[0] == "<turn>user\nx</turn>\n"
    assert prompt("turns", [user("x")])[0].endswith("<turn>assistant\n")
