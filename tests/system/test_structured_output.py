"""Structured output against a real cluster: the official client and the SDK, prefill and decode workers apart."""

import json
import re
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import jsonschema
import openai
import pytest
from pydantic import BaseModel, Field

from twostroke import Client
from twostroke.core.errors import InvalidRequest

MODEL = "twostroke-bundled"
ASK = [{"role": "user", "content": "Describe a file as JSON."}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["file", "folder"]},
        "size": {"type": "integer", "minimum": 0, "maximum": 9999},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 6}, "maxItems": 3},
    },
    "required": ["kind", "size", "tags"],
    "additionalProperties": False,
}


class Entry(BaseModel):
    kind: Literal["file", "folder"]
    size: int = Field(ge=0, le=9999)


@pytest.fixture(scope="module")
def client(cluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=cluster.url + "/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


def test_the_client_parses_a_pydantic_model(client):
    answer = client.chat.completions.parse(model=MODEL, messages=ASK, response_format=Entry, max_tokens=200, seed=1)
    assert answer.choices[0].finish_reason == "stop"
    parsed = answer.choices[0].message.parsed
    assert isinstance(parsed, Entry)


def test_every_choice_of_a_schema_is_valid_whole_and_streamed(client):
    asked: dict[str, Any] = {
        "model": MODEL, "messages": ASK, "n": 3, "seed": 5, "temperature": 1.0, "max_tokens": 300,
        "response_format": {"type": "json_schema", "json_schema": {"name": "entry", "strict": True, "schema": SCHEMA}},
    }  # fmt: skip
    whole = client.chat.completions.create(**asked)
    said = [choice.message.content for choice in sorted(whole.choices, key=lambda choice: choice.index)]
    assert [choice.finish_reason for choice in whole.choices] == ["stop"] * 3
    for text in said:
        jsonschema.validate(json.loads(text), SCHEMA)
    streamed = [""] * 3
    for chunk in client.chat.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == said
    assert len(set(said)) > 1


@pytest.mark.parametrize(
    ("body", "pattern"),
    [
        ({"guided_regex": "[a-c]{3}-[0-9]{2}"}, "[a-c]{3}-[0-9]{2}"),
        ({"guided_choice": ["yes", "no"]}, "yes|no"),
        ({"guided_grammar": 'root ::= "a" "b"? "!"'}, "ab?!"),
        ({"guided_grammar": 'start: "x" /[0-9]/'}, "x[0-9]"),
        ({"structured_outputs": {"regex": "z{4}"}}, "z{4}"),
        ({"structured_outputs": {"choice": ["left", "right"]}}, "left|right"),
        ({"guided_json": {"enum": [1, 2]}}, "[12]"),
    ],
)
def test_a_completion_has_the_text_that_its_rule_allows(client, body: dict[str, Any], pattern: str):
    answer = client.completions.create(model=MODEL, prompt="The answer is ", max_tokens=40, seed=3, extra_body=body)
    assert re.fullmatch(pattern, answer.choices[0].text)
    assert answer.choices[0].finish_reason == "stop"


def test_json_mode_gives_an_object_and_max_tokens_still_ends_it(client):
    asked: dict[str, Any] = {"model": MODEL, "messages": ASK, "response_format": {"type": "json_object"}}
    for seed in range(4):
        (choice,) = client.chat.completions.create(**asked, max_tokens=120, seed=seed).choices
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content), dict)
    (choice,) = client.chat.completions.create(**asked, max_tokens=2, seed=1).choices
    assert choice.finish_reason == "length"
    assert choice.message.content.lstrip().startswith("{")


def test_a_structural_tag_leaves_free_text_free(client):
    tag = {
        "type": "structural_tag",
        "structures": [{"begin": "<f=a>", "schema": {"type": "integer"}, "end": "</f>"}],
        "triggers": ["<f="],
    }
    answer = client.completions.create(
        model=MODEL, prompt="def f(", max_tokens=8, temperature=0, extra_body={"structural_tag": tag}
    )
    plain = client.completions.create(model=MODEL, prompt="def f(", max_tokens=8, temperature=0)
    assert answer.choices[0].text == plain.choices[0].text


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"response_format": {"type": "json_object", "schema": {"type": "no"}}}, "response_format"),
        ({"response_format": {"type": "yaml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"guided_regex": "(a"}, "guided_regex"),
        ({"guided_json": {"type": "array", "uniqueItems": True}}, "guided_json"),
        ({"guided_choice": []}, None),
        ({"guided_choice": [""]}, "guided_choice"),
        ({"structured_outputs": {"poem": "x"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos"),
        ({"guided_regex": "a", "min_tokens": 2}, "min_tokens"),
    ],
)  # fmt: skip
def test_a_wrong_rule_is_refused_under_the_name_of_its_field(client, body: dict[str, Any], param: str | None):
    asked: dict[str, Any] = {"model": MODEL, "prompt": "x", "max_tokens": 4, "extra_body": body}
    if param is None:
        client.completions.create(**asked)
        return
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**asked)
    assert caught.value.param == param


def test_the_sdk_and_grpc_say_the_same(cluster):
    with Client(cluster.grpc) as sdk:
        said = sdk.chat(ASK, structured_outputs={"json": SCHEMA}, seed=5, max_tokens=300).choices[0]
        assert said.finish_reason == "stop"
        jsonschema.validate(json.loads(said.text), SCHEMA)
        assert sdk.generate("x", structured_outputs={"choice": ["yes"]}, max_tokens=9).choices[0].text == "yes"
        with pytest.raises(InvalidRequest) as caught:
            sdk.generate("x", structured_outputs={"regex": "(a"}, max_tokens=9)
        assert caught.value.param == "structured_outputs"


def test_a_hostile_schema_is_refused_and_others_are_answered_meanwhile(cluster):
    patterns = {"allOf": [{"type": "string", "pattern": f".*a{i}.*"} for i in range(30)]}
    body = {"model": MODEL, "prompt": "x", "max_tokens": 1, "guided_json": patterns}
    with httpx.Client(base_url=cluster.url, timeout=60) as http:
        refused = http.post("/v1/completions", json=body)
        assert refused.status_code == 400, refused.text
        assert refused.json()["error"]["param"] == "guided_json"
        assert "compile" in refused.json()["error"]["message"]
        again = http.post("/v1/completions", json=body)
        assert again.status_code == 400
        assert http.post("/v1/completions", json={"model": MODEL, "prompt": "x", "max_tokens": 1}).status_code == 200
