"""The table of sampling fields is complete, and every field reaches the worker by each way in which it can be sent.

Values are made from the rows, so that a new field is tested as soon as it is in the table.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from gguf import GGUFWriter
from google.protobuf.descriptor import FieldDescriptor

from twostroke.client import calls
from twostroke.core.errors import InvalidRequest
from twostroke.core.request import Epoch, Grammar, SamplingParams, SequenceKey
from twostroke.core.sampling import FIELDS, Form, SamplingField, SamplingOptions
from twostroke.decode_worker.order import order_from_wire
from twostroke.engine import facts as engine_facts
from twostroke.engine.link import wire as link_wire
from twostroke.kv.codec import Codec
from twostroke.kv.keys import PromptHasher
from twostroke.kv.messages import sampling_from_wire, sampling_to_wire
from twostroke.kv.recent_prompts import RecentPrompts
from twostroke.kv.spec import attention_spec
from twostroke.protos import common_pb2, inference_pb2, worker_pb2
from twostroke.router.api import defaults
from twostroke.router.api.call import GenerateCall
from twostroke.router.api.defaults import NO_DEFAULTS, SamplingDefaults
from twostroke.router.api.fields import ChatBody, CompletionBody
from twostroke.router.api.grpc import call_wire
from twostroke.router.api.models import ModelDirectory, ServedModel
from twostroke.router.api.openai_requests import chat_call, completion_calls, parse
from twostroke.router.api.sampling import OWN_CHECKS
from twostroke.router.api.validate import Limits, validate
from twostroke.router.keys.grants import KeyRing
from twostroke.router.requests.explain import explain_sampling
from twostroke.router.routing.facts import ModelFacts
from twostroke.router.workers.wire import submit_to_wire

BUNDLED = Path(__file__).resolve().parents[3] / "model" / "bundled"
VOCAB, CONTEXT = 4096, 1024
LIMITS = Limits(8, None, 60.0, KeyRing())
HELLO: list[dict[str, Any]] = [{"role": "user", "content": "hello"}]
KEY, EPOCH = SequenceKey("r", 0), Epoch(1, 1)
ON_WIRE = common_pb2.SamplingParams.DESCRIPTOR.fields_by_name
WORKER_MODEL = engine_facts.ModelFacts(
    "m", "", VOCAB, CONTEXT, frozenset({1}), b"w" * 16, b"n" * 16, "", True, attention_spec(1, 1, 32, Codec.BF16)
)
each_field = pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)


class Offers:
    def models(self) -> list[ModelFacts]:
        return [ModelFacts("m", b"f" * 16, b"n" * 16, "", CONTEXT, VOCAB, True, str(BUNDLED), 1)]


DIRECTORY = ModelDirectory(Offers(), reads_defaults=False)


@pytest.fixture
async def model() -> ServedModel:
    return await DIRECTORY.get("m")


def other_than_neutral(field: SamplingField) -> Any:
    """A value as a client sends it, within the bounds, that changes something."""
    if field.form is Form.NUMBER:
        return (field.low + field.high) / 2 if field.neutral != (field.low + field.high) / 2 else field.high
    listed = {Form.TEXTS: ["a", "€"], Form.TOKEN_IDS: [3, 4], Form.WORDS: ["word"], Form.BIASES: {7: 1.5}}
    listed[Form.GRAMMAR] = {"regex": "a+"}
    return listed.get(field.form, not field.neutral if field.form is Form.FLAG else 3)


def as_params_have_it(field: SamplingField, value: Any) -> Any:
    if field.form is Form.GRAMMAR:
        ((kind, source),) = value.items()
        return Grammar(kind, source)
    return tuple(value.items()) if field.form is Form.BIASES else tuple(value) if field.is_list else value


# ---------------------------------------------------------------- the table is complete


def test_the_table_has_every_field_and_no_other() -> None:
    assert sorted(field.name for field in FIELDS) == sorted(field.name for field in fields(SamplingParams))
    assert sorted(field.api for field in FIELDS) == sorted(SamplingOptions.__annotations__)
    assert set(ON_WIRE) == {name for field in FIELDS for name in (field.api, field.wire)}
    assert SamplingOptions.__annotations__.keys() <= calls.Options.__annotations__.keys()
    for body in (ChatBody, CompletionBody):
        assert {name for field in FIELDS for name in (field.api, *field.aliases)} <= body.model_fields.keys()
    recommended = [field.name for field in FIELDS if field.checkpoint]
    assert sorted(recommended) == sorted(field.name for field in fields(SamplingDefaults))
    assert not {field.checkpoint for field in FIELDS} & defaults._NOT_SERVED.keys()
    assert not {field.gguf for field in FIELDS} & defaults._NOT_SERVED_GGUF.keys()


@each_field
def test_its_types_say_what_the_row_says(field: SamplingField) -> None:
    kind = get_type_hints(SamplingOptions)[field.api]
    texts = str | Sequence[str] if field.takes_one else Sequence[str]
    types = {Form.WHOLE: int, Form.NUMBER: float, Form.FLAG: bool, Form.TEXTS: texts, Form.WORDS: texts}
    types |= {Form.TOKEN_IDS: Sequence[int], Form.BIASES: Mapping[int, float], Form.GRAMMAR: Mapping[str, Any]}
    assert kind == types[field.form]
    wire = ON_WIRE[field.api]
    numbers = {FieldDescriptor.TYPE_UINT32, FieldDescriptor.TYPE_UINT64}
    wires = {Form.WHOLE: numbers, Form.NUMBER: {FieldDescriptor.TYPE_DOUBLE}, Form.FLAG: {FieldDescriptor.TYPE_BOOL}}
    messages = {FieldDescriptor.TYPE_MESSAGE}
    wires |= {Form.TOKEN_IDS: numbers, Form.BIASES: messages, Form.GRAMMAR: messages}
    assert wire.type in wires.get(field.form, {FieldDescriptor.TYPE_STRING})
    assert wire.is_repeated == (field.is_list or field.form is Form.BIASES)
    assert wire.is_repeated or wire.has_presence or field.neutral is False, "0 could not be told from nothing said"
    assert field.max_entries > 0 if wire.is_repeated else field.max_entries == 0


# ---------------------------------------------------------------- every way to a worker


def completion(said: dict[str, Any]) -> GenerateCall:
    body, unknown = parse(json.loads(json.dumps({"prompt": "hello"} | said)), CompletionBody)
    assert not unknown
    (call,) = completion_calls(body, None, 1)
    return call


def chat(said: dict[str, Any]) -> GenerateCall:
    if "logprobs" in said:  # a chat says whether, and how many under another name
        said = {"logprobs": True, "top_logprobs": said["logprobs"]}
    body, unknown = parse(json.loads(json.dumps({"messages": HELLO} | said)), ChatBody)
    assert not unknown
    return chat_call(body, None)


def sdk_generate(said: Any) -> GenerateCall:
    sent = calls.generate("hello", said).request.SerializeToString()
    received = inference_pb2.GenerateRequest.FromString(sent)
    return call_wire.generate_call(call_wire.Said(received, None, None, DIRECTORY))


def sdk_chat(said: Any) -> GenerateCall:
    sent = calls.chat(HELLO, said).request.SerializeToString()
    return call_wire.chat_call(call_wire.Said(inference_pb2.ChatRequest.FromString(sent), None, None, DIRECTORY))


def at_the_worker(call: GenerateCall, model: ServedModel) -> SamplingParams:
    """The parameters that reach the engine, which are the ones that the router validated."""
    request = validate(call, model, LIMITS)
    sent = submit_to_wire(KEY, request, EPOCH, (), 5.0).SerializeToString()
    prompts = RecentPrompts(PromptHasher.of(b"k" * 32, WORKER_MODEL))
    params = order_from_wire(worker_pb2.Submit.FromString(sent), WORKER_MODEL, prompts, 0).params
    assert params == request.sampling
    assert link_wire.decode(link_wire.encode(params)) == params
    return params


@each_field
@pytest.mark.parametrize("way", [completion, chat, sdk_generate, sdk_chat], ids=lambda way: way.__name__)
def test_a_value_reaches_the_worker_and_changes_no_other_field(way: Any, field: SamplingField, model: ServedModel):
    value = other_than_neutral(field)
    silent, told = at_the_worker(way({}), model), at_the_worker(way({field.api: value}), model)
    found = getattr(told, field.name)
    assert found != getattr(silent, field.name)
    if field.form is not Form.WORDS:  # their tokens are the tokenizer's
        assert found == as_params_have_it(field, value)
    apart = dict.fromkeys((field.name, "seed"))  # a seed is drawn for each
    assert replace(told, **apart) == replace(silent, **apart)
    shown, usual = explain_sampling(told), explain_sampling(silent)
    assert list(shown) == [one.name for one in fields(SamplingParams)]
    assert json.dumps(shown[field.name]) != json.dumps(usual[field.name])


@each_field
def test_the_message_to_a_worker_has_it_under_the_name_of_its_row(field: SamplingField) -> None:
    value = [(5, 6)] if field.form is Form.WORDS else other_than_neutral(field)
    params = replace(SamplingParams(max_tokens=1), **{field.name: as_params_have_it(field, value)})
    found = getattr(sampling_to_wire(params), field.wire)
    if field.form is Form.GRAMMAR:
        found = {found.WhichOneof("rule"): found.regex}
    assert [tuple(word.ids) for word in found] == value if field.form is Form.WORDS else found == value


def test_a_chat_that_wants_no_logprobs_has_none(model: ServedModel) -> None:
    body, _ = parse({"messages": HELLO, "logprobs": False}, ChatBody)
    assert at_the_worker(chat_call(body, None), model).logprobs is None


@each_field
def test_nothing_said_is_neutral(field: SamplingField, model: ServedModel) -> None:
    if not field.is_required:  # `max_tokens` and `seed` are always made
        for way in (completion, chat, sdk_generate, sdk_chat):
            assert getattr(at_the_worker(way({}), model), field.name) == field.neutral
        order = common_pb2.SamplingParams(max_tokens=1, seed=1)
        assert getattr(sampling_from_wire(order), field.name) == field.neutral


@pytest.mark.parametrize(("field", "alias"), [(field, alias) for field in FIELDS for alias in field.aliases])
def test_an_alias_says_the_same(field: SamplingField, alias: str, model: ServedModel) -> None:
    value = other_than_neutral(field)
    for way in (completion, chat):
        assert getattr(at_the_worker(way({alias: value}), model), field.name) == value
        with pytest.raises(InvalidRequest, match=f"^{field.api} and {alias} differ"):
            way({field.api: value, alias: value + 1})


# ---------------------------------------------------------------- bounds


def beyond(field: SamplingField) -> Any:
    if field.form is Form.GRAMMAR:
        return {"grammar": "a" * (field.max_chars + 1)}
    if field.form is Form.BIASES:
        return dict.fromkeys(range(field.max_entries + 1), 1.0)
    return other_than_neutral(field)[:1] * (field.max_entries + 1) if field.is_list else field.high * 2 + 2


@pytest.mark.parametrize("field", [one for one in FIELDS if one.form is not Form.FLAG], ids=lambda field: field.name)
@pytest.mark.parametrize("way", [completion, chat, sdk_generate, sdk_chat], ids=lambda way: way.__name__)
def test_a_client_is_refused_outside_of_the_bounds(way: Any, field: SamplingField, model: ServedModel) -> None:
    assert field.max_entries or field.max_chars or (math.isfinite(field.low) and math.isfinite(field.high))
    with pytest.raises(InvalidRequest) as caught:
        at_the_worker(way({field.api: beyond(field)}), model)
    assert caught.value.param in (field.api, f"top_{field.api}")  # a chat's `logprobs` are its `top_logprobs`


# The last values that are taken and the first that are refused: vLLM's and OpenAI's, not read from the table.
EDGES: dict[str, tuple[list[Any], list[Any]]] = {
    "max_tokens": ([1], [0, 2**31]),
    "temperature": ([0.0, 100.0], [-1e-9, 100.001]),
    "top_p": ([1e-9, 1.0], [-1e-9, 1.001]),
    "top_k": ([0, VOCAB], [-2]),
    "min_p": ([0.0, 1.0], [-1e-9, 1.001]),
    "seed": ([-(2**63), 2**64 - 1], [-(2**63) - 1, 2**64]),
    "repetition_penalty": ([0.01, 10.0], [0.009, 10.001]),
    "frequency_penalty": ([-2.0, 2.0], [-2.001, 2.001]),
    "presence_penalty": ([-2.0, 2.0], [-2.001, 2.001]),
    "logit_bias": (
        [{0: -100.0}, {VOCAB - 1: 100.0}, dict.fromkeys(range(1024), 1.0)],
        [{0: -100.001}, {0: 100.001}, {VOCAB: 1.0}, {-1: 1.0}, dict.fromkeys(range(1025), 1.0)],
    ),
    "bad_words": ([["a"] * 128, ["a" * 256]], [["a"] * 129, ["a" * 257], [""]]),
    "stop": ([["a"] * 16, ["a" * 256]], [["a"] * 17, ["a" * 257], [""]]),
    "stop_token_ids": ([[0, VOCAB - 1], [7] * 256], [[VOCAB], [-1], [7] * 257]),
    "min_tokens": ([0, 16], [-1, 17]),  # beside a `max_tokens` of 16
    "logprobs": ([0, 20], [-1, 21]),
    "prompt_logprobs": ([0, 20], [-1, 21]),
    "structured_outputs": (
        [{"grammar": "a" * (1 << 17)}, {"choice": ["a"] * 1024}],
        [{"grammar": "a" * ((1 << 17) + 1)}, {"choice": ["a"] * 1025}, {"poem": "a"}, {"regex": ""}],
    ),
}


@pytest.mark.parametrize("name", [one.api for one in FIELDS if one.form is not Form.FLAG])
@pytest.mark.parametrize("way", [completion, chat, sdk_generate, sdk_chat], ids=lambda way: way.__name__)
def test_the_bounds_are_those_that_clients_know(way: Any, name: str, model: ServedModel) -> None:
    taken, refused = EDGES[name]
    for value in taken:
        at_the_worker(way({"max_tokens": 16} | {name: value}), model)
    for value in refused:
        if (way, name, value) != (completion, "max_tokens", 0):  # of a prompt alone, for `echo`
            with pytest.raises(InvalidRequest):
                validate(way({"max_tokens": 16} | {name: value}), model, LIMITS)


def test_a_top_k_of_the_whole_vocabulary_is_off(model: ServedModel) -> None:
    found = [at_the_worker(completion({"top_k": top_k}), model).top_k for top_k in (VOCAB - 1, VOCAB, VOCAB + 1, -1)]
    assert found == [VOCAB - 1, 0, 0, 0]


def test_a_token_has_one_bias(model: ServedModel) -> None:
    with pytest.raises(InvalidRequest, match="each once"):
        at_the_worker(completion({"logit_bias": {"7": 1.0, "07": 2.0}}), model)


COMPUTABLE: dict[str, tuple[list[float], list[float]]] = {
    "max_tokens": ([1, 2**31], [0]),
    "temperature": ([0.0, 1e6], [-1e-9, 1.1e6]),
    "top_p": ([5e-324, 1.0], [0.0, 1.001]),
    "min_p": ([0.0, 1.0], [-1e-9, 1.001]),
    "repetition_penalty": ([5e-324, 1.7e308], [0.0, -1.0]),
}


@pytest.mark.parametrize("name", [one.name for one in FIELDS if one.computable])
def test_a_worker_takes_what_it_can_compute_with_whatever_a_router_of_another_release_allows(name: str) -> None:
    def params(value: float) -> SamplingParams:
        return sampling_from_wire(common_pb2.SamplingParams(**({"max_tokens": 1, "seed": 1} | {name: value})))

    taken, refused = COMPUTABLE[name]
    for value in taken:
        assert getattr(params(value), name) == value
    for value in refused:
        with pytest.raises(InvalidRequest):
            params(value)


def test_a_form_without_a_general_check_has_its_own() -> None:
    assert OWN_CHECKS.keys() <= {field.name for field in FIELDS}
    assert all(field.name in OWN_CHECKS for field in FIELDS if field.form in (Form.WORDS, Form.BIASES, Form.GRAMMAR))


@pytest.mark.parametrize("field", [one for one in FIELDS if one.form is Form.NUMBER], ids=lambda field: field.name)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_worker_refuses_numbers_that_are_none(field: SamplingField, value: float) -> None:
    with pytest.raises(InvalidRequest):
        sampling_from_wire(common_pb2.SamplingParams(**({"max_tokens": 1, "seed": 1} | {field.wire: value})))


# ---------------------------------------------------------------- a checkpoint's defaults


RECOMMENDED = [field for field in FIELDS if field.checkpoint]
STORED: dict[Form, Any] = {Form.TEXTS: ["a", "€"], Form.WORDS: [[7], [8, 9]]}  # other forms as a client sends them


@pytest.mark.parametrize("field", RECOMMENDED, ids=lambda field: field.name)
async def test_a_checkpoints_default_holds_where_nothing_is_said(
    field: SamplingField, model: ServedModel, tmp_path: Path
) -> None:
    stored = STORED.get(field.form, other_than_neutral(field))
    (tmp_path / "generation_config.json").write_text(json.dumps({field.checkpoint: stored}))
    found = SamplingDefaults.load(tmp_path, VOCAB)
    expected = tuple(map(tuple, stored)) if field.form is Form.WORDS else as_params_have_it(field, stored)
    assert found == replace(NO_DEFAULTS, **{field.name: expected})
    recommending = replace(model, defaults=found)
    assert getattr(at_the_worker(GenerateCall(prompt="hello"), recommending), field.name) == expected


def test_a_gguf_file_gives_every_default_that_has_a_name_there(tmp_path: Path) -> None:
    stored = {field: other_than_neutral(field) for field in FIELDS if field.gguf}
    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    for field, value in stored.items():
        (writer.add_float32 if isinstance(value, float) else writer.add_int32)(f"general.sampling.{field.gguf}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    expected = replace(NO_DEFAULTS, **{field.name: value for field, value in stored.items()})
    assert SamplingDefaults.load(tmp_path / "m.gguf", VOCAB) == expected
