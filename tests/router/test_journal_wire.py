"""What the journal's messages carry: every field of a request, its sampling and its pieces, or a named exception."""

from __future__ import annotations

from dataclasses import MISSING, Field, fields
from typing import Any

import pytest

from twostroke.core.errors import InvalidRequest
from twostroke.core.request import (
    Allowance,
    AnswerForm,
    FinishReason,
    Grammar,
    Request,
    SamplingParams,
    TokenLogprobs,
)
from twostroke.router.journal.journal import Asked
from twostroke.router.journal.wire import asked_from_wire, asked_to_wire, piece_from_wire, piece_to_wire
from twostroke.router.requests.pieces import OutputDelta, TokenUsage

# Fields that no adopted or followed request needs, with the reason.
LEFT_OUT = {
    "Request.ignored_fields": "its client was told when it began",
    "OutputDelta.prompt_scores": "no resumable request has any",
}

SAMPLING = SamplingParams(
    max_tokens=77,
    temperature=0.5,
    top_p=0.25,
    top_k=7,
    seed=2**60 + 1,
    stop=("x", "y"),
    stop_token_ids=(3, 4),
    ignore_eos=True,
    min_tokens=2,
    min_p=0.125,
    repetition_penalty=1.5,
    frequency_penalty=-0.5,
    presence_penalty=0.75,
    logit_bias=((5, 1.5), (6, -2.0)),
    bad_words=((1, 2), (3,)),
    include_stop=True,
    skip_special_tokens=False,
    logprobs=3,
    prompt_logprobs=0,
    grammar=Grammar("json", '{"type": "object"}'),
)
TOOLS = ({"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}},)
REQUEST = Request(
    request_id="r",
    model="m",
    prompt_ids=(1, 2, 3),
    sampling=SAMPLING,
    num_choices=3,
    isolation_domain="tenant/salt",
    timeout_s=12.5,
    is_chat=True,
    is_bounded=False,
    ignored_fields=("odd",),
    tenant="tenant",
    adapter=b"a",
    base_model="base",
    answer=AnswerForm("<think>\n", TOOLS, parallel=False, hides_special_tokens=True),
    priority=-7,
    allowance=Allowance("key", 60.0, 1e6, 2.5),
)
PIECE = OutputDelta(
    choice=2,
    first_index=4,
    token_ids=(8, 9),
    text="hé",
    finish_reason=FinishReason.LENGTH,
    usage=TokenUsage(3, 6, 2, 5, 4),
    logprobs=(TokenLogprobs(8, -0.5, 1, ((8, -0.5), (9, -2.0))), TokenLogprobs(9, -1.5, 2, ())),
    num_shown=5,
)
ASKED = Asked(REQUEST, "chat.completion", {"stream": True}, 1234, "key", b"print")


def default_of(field: Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


@pytest.mark.parametrize(
    "value",
    [REQUEST, SAMPLING, REQUEST.answer, REQUEST.allowance, PIECE, PIECE.usage, ASKED],
    ids=lambda value: type(value).__name__,
)
def test_the_examples_here_say_something_in_every_field(value: Any):
    kind = type(value).__name__
    for field in fields(value):
        if f"{kind}.{field.name}" not in LEFT_OUT:
            said = getattr(value, field.name)
            assert said != default_of(field), f"journal {kind}.{field.name}, and give it a value here; or name it above"
            assert said or default_of(field) is not MISSING, f"{kind}.{field.name} is empty here"


def test_a_journaled_request_comes_back_whole():
    back = asked_from_wire(asked_to_wire(ASKED))
    check_same_fields(REQUEST, back.request)
    for field in fields(Asked):
        if field.name != "request":
            assert getattr(back, field.name) == getattr(ASKED, field.name), field.name


def test_a_request_that_says_nothing_comes_back_as_it_was():
    request = Request("r", "m", (1,), SamplingParams(5), 1, "d", 1.0, tenant="d")
    back = asked_from_wire(asked_to_wire(Asked(request, "grpc", {}, 1)))
    assert back.request == request
    plain = AnswerForm("", None)
    form = asked_from_wire(asked_to_wire(Asked(with_answer(request, plain), "grpc", {}, 1))).request.answer
    assert form == plain


def test_a_journaled_piece_comes_back_whole():
    check_same_fields(PIECE, piece_from_wire(piece_to_wire(PIECE)))


@pytest.mark.parametrize("tools", ["", "3", "{}", "[1]", "[[]]"])
def test_tools_of_another_form_are_refused(tools: str):
    message = asked_to_wire(ASKED)
    message.answer.tools_json = tools
    with pytest.raises(InvalidRequest, match="tools"):
        asked_from_wire(message)


def with_answer(request: Request, form: AnswerForm) -> Request:
    values = {field.name: getattr(request, field.name) for field in fields(Request)}
    return Request(**values | {"answer": form})


def check_same_fields(sent: Any, back: Any) -> None:
    for field in fields(sent):
        name = f"{type(sent).__name__}.{field.name}"
        expected = default_of(field) if name in LEFT_OUT else getattr(sent, field.name)
        assert getattr(back, field.name) == expected, name
