"""Request bodies: the three classes of fields, and what a body may cost."""

import json
from typing import Any

import pytest
from pydantic import ValidationError

from twostroke.core.errors import InvalidRequest, UnsupportedParameter
from twostroke.router.api import fields
from twostroke.router.api.fields import ChatBody, CompletionBody
from twostroke.router.api.http.structure import finished
from twostroke.router.api.openai_requests import (
    MAX_NAMED,
    chat_call,
    completion_calls,
    json_object,
    names_of_ignored,
    parse,
    prompts_of,
)

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}]}
TEXT: dict[str, Any] = {"prompt": "x"}
USUAL = [(ChatBody, CHAT), (CompletionBody, TEXT)]


def read(kind: Any, body: dict[str, Any], **options: Any) -> tuple[Any, list[str]]:
    return parse(json.loads(json.dumps(body)), kind, **options)


# ---------------------------------------------------------------- the three classes


def test_no_field_is_in_two_classes():
    served = set(ChatBody.model_fields) | set(CompletionBody.model_fields)
    assert not served & fields.ACCEPTED
    assert not served & set(fields.REFUSED)
    assert not fields.ACCEPTED & set(fields.REFUSED)
    assert not set(ChatBody.model_fields) & set(fields.REFUSED_OF_CHATS)
    assert not set(CompletionBody.model_fields) & set(fields.REFUSED_OF_COMPLETIONS)


def test_what_clients_of_others_ask_for_and_would_miss_is_known():
    tools = {"functions", "function_call"}
    guided = {"grammar", "json_schema", "regex", "ebnf"}
    others = {
        "best_of",
        "use_beam_search",
        "logits_processors",
        "allowed_token_ids",
        "truncate_prompt_tokens",
    }
    assert tools | guided | others <= set(fields.REFUSED)


@pytest.mark.parametrize(("kind", "usual"), USUAL)
@pytest.mark.parametrize("strict", [False, True])
def test_accepted_fields_change_nothing_whatever_they_hold(kind, usual, strict: bool):
    plain = read(kind, usual)
    for value in (None, True, "x", 7, [1], {"a": {"b": 1}}):
        assert read(kind, usual | dict.fromkeys(fields.ACCEPTED, value), strict=strict) == plain


@pytest.mark.parametrize(("kind", "usual"), USUAL)
def test_refused_fields_are_refused_by_name_unless_they_are_off(kind, usual):
    refused = fields.REFUSED | (fields.REFUSED_OF_CHATS if kind is ChatBody else fields.REFUSED_OF_COMPLETIONS)
    for name, off in refused.items():
        with pytest.raises(UnsupportedParameter, match=f"^{name} ") as caught:
            read(kind, usual | {name: {"something": "else"}})
        assert caught.value.param == name
        for value in (None, *off):
            assert read(kind, usual | {name: value}) == read(kind, usual), (name, value)


def test_as_many_candidates_as_choices_is_no_search():
    assert read(CompletionBody, TEXT | {"n": 3, "best_of": 3})[0].n == 3
    with pytest.raises(UnsupportedParameter):
        read(CompletionBody, TEXT | {"n": 2, "best_of": 3})
    with pytest.raises(UnsupportedParameter):
        read(CompletionBody, TEXT | {"best_of": 2})


@pytest.mark.parametrize(
    ("odd", "named", "near"),
    [
        ({"temperture": 0}, "temperture", "temperature"),
        ({"max_token": 5}, "max_token", "max_tokens"),
        ({"stream_options": {"include_usge": True}}, "stream_options.include_usge", "stream_options.include_usage"),
        ({"qwertyuiop": 5}, "qwertyuiop", None),
    ],
)
def test_unknown_fields_are_named_and_strictly_refused(odd: dict[str, Any], named: str, near: str | None):
    for kind, usual in USUAL:
        body, unknown = read(kind, usual | odd)
        assert body.temperature is body.max_tokens is None
        assert unknown == [named]
        with pytest.raises(InvalidRequest) as caught:
            read(kind, usual | odd, strict=True)
        hint = f"; did you mean {near}?" if near else ""
        assert (caught.value.message, caught.value.param) == (f"{named} is not a field of this API{hint}", named)


def test_what_a_header_says_of_ignored_fields_is_bounded_and_harmless():
    assert names_of_ignored(["a", "b.c"]) == "a, b.c"
    assert names_of_ignored(["", "a\r\nx: y", "größe", "1, 2 more"]) == "?, a??x??y, gr??e, 1??2?more"
    told = names_of_ignored(["x" * 1_000_000] * 370_000)
    assert len(told) < 80 * MAX_NAMED
    assert told.endswith(f", {370_000 - MAX_NAMED} more")


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("value", [16.5, "16", True, [16], 1e300])
def test_no_other_thing_becomes_a_whole_number(value: Any):
    with pytest.raises(InvalidRequest) as caught:
        read(ChatBody, CHAT | {"max_tokens": value})
    assert caught.value.param == "max_tokens"


def test_whole_floats_are_whole_numbers():
    body, _ = read(ChatBody, CHAT | {"max_tokens": 16.0, "n": 2.0, "seed": -3.0, "stop_token_ids": [4.0]})
    assert (body.max_tokens, body.n, body.seed, body.stop_token_ids) == (16, 2, -3, [4])
    assert isinstance(body.max_tokens, int)


def test_null_is_nothing_said():
    for kind, usual in USUAL:
        assert read(kind, dict.fromkeys(kind.model_fields) | usual) == read(kind, usual)


@pytest.mark.parametrize(
    ("fields_", "max_tokens", "usual"),
    [
        ({}, None, 16),
        ({"max_tokens": 5}, 5, 16),
        ({"max_completion_tokens": 5}, 5, 16),
        ({"max_tokens": 5, "max_completion_tokens": 5}, 5, 16),
        ({"max_tokens": -1}, None, 2**31 - 1),
        ({"max_tokens": 0, "echo": True}, 1, 16),
        ({"max_tokens": 0}, 0, 16),
    ],
)
def test_how_many_tokens_a_completion_means(fields_: dict[str, Any], max_tokens: int | None, usual: int):
    (call,) = completion_calls(read(CompletionBody, TEXT | fields_)[0], None, 1)
    assert (call.sampling.get("max_tokens"), call.usual_max_tokens) == (max_tokens, usual)


def test_a_chat_has_no_usual_length_of_its_own():
    call = chat_call(read(ChatBody, CHAT)[0], None)
    assert (call.sampling.get("max_tokens"), call.usual_max_tokens) == (None, None)
    call = chat_call(read(ChatBody, CHAT | {"max_tokens": -1})[0], None)
    assert (call.sampling.get("max_tokens"), call.usual_max_tokens) == (None, 2**31 - 1)


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        ([1, 2], [[1, 2]]),
        (["a"], ["a"]),
        ([[1, 2]], [[1, 2]]),
        (["a", "b"], ["a", "b"]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        (["a", [1]], ["a", [1]]),
    ],
)
def test_prompts_in_all_their_forms(prompt: Any, prompts: list[Any]):
    body, _ = read(CompletionBody, {"prompt": prompt})
    assert prompts_of(body, 8) == prompts
    assert [call.prompt for call in completion_calls(body, None, 8)] == prompts


@pytest.mark.parametrize("prompt", [5, {"a": 1}, True, [], ["a", 5], [[1], None], ["a"] * 9])
def test_what_is_no_prompt_is_refused(prompt: Any):
    body, _ = read(CompletionBody, {"prompt": prompt})
    with pytest.raises(InvalidRequest) as caught:
        prompts_of(body, 8)
    assert caught.value.param == "prompt"


def test_a_byte_order_mark_is_no_mistake():
    assert finished(json_object(bytearray(b"\xef\xbb\xbf" + json.dumps(TEXT).encode()))) == TEXT


# ---------------------------------------------------------------- what a body may cost

HOSTILE: list[tuple[Any, dict[str, Any]]] = [
    (CompletionBody, {"prompt": "x", "stop": [1] * 20_000}),
    (CompletionBody, {"prompt": "x", "stop": ["x"] * 20_000}),
    (CompletionBody, {"prompt": "x", "stop_token_ids": ["x"] * 20_000}),
    (CompletionBody, {"prompt": "x", "bad_words": [None] * 20_000}),
    (CompletionBody, {"prompt": "x", "logit_bias": {str(key): "x" for key in range(20_000)}}),
    (ChatBody, {"messages": [1] * 20_000}),
    (ChatBody, {"messages": [{}] * 20_000}),
    (ChatBody, {"messages": [{}], "documents": [1] * 20_000}),
]


@pytest.mark.parametrize(("kind", "body"), HOSTILE, ids=lambda value: str(value)[:40])
def test_one_mistake_is_found_however_many_there_are(kind, body: dict[str, Any]):
    """Each would be collected with its own path, text and input: seconds of standstill for one small body."""
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    assert caught.value.error_count() == 1


@pytest.mark.parametrize(
    "odd",
    [
        {"temperature": "h" * 1_000_000},
        {"temperature": [[1] * 100_000]},
        {"logit_bias": {"x" * 1_000_000: "y"}},
        {"x" * 1_000_000: 1},
        {"prompt": {"a" * 1_000_000: 1}},
        {"prompt": ["x", {"x" * 1_000_000: 1}]},
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_error_never_echoes_much(odd: dict[str, Any]):
    with pytest.raises(InvalidRequest) as caught:
        prompts_of(read(CompletionBody, TEXT | odd, strict=True)[0], 8)
    assert len(caught.value.message) < 400
    assert len(caught.value.param or "") < 100
