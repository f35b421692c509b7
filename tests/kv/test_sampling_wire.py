"""Sampling parameters and logprobs cross our wires whole; what would break a worker is refused."""

from dataclasses import fields, replace

import pytest

from twostroke.core.errors import InvalidRequest
from twostroke.core.request import Grammar, SamplingParams, TokenLogprobs
from twostroke.kv.messages import logprobs_from_wire, logprobs_to_wire, sampling_from_wire, sampling_to_wire
from twostroke.protos import common_pb2

FULL = SamplingParams(
    max_tokens=7,
    temperature=0.3,
    top_p=0.9,
    top_k=11,
    seed=(1 << 64) - 5,
    stop=("a", "€"),
    stop_token_ids=(3, 4),
    ignore_eos=True,
    min_tokens=2,
    min_p=0.05,
    repetition_penalty=1.25,
    frequency_penalty=-0.7,
    presence_penalty=1.9,
    logit_bias=((5, -100.0), (900, 0.1)),
    bad_words=((1, 2), (3,)),
    include_stop=True,
    skip_special_tokens=False,
    logprobs=0,
    prompt_logprobs=20,
    grammar=Grammar("regex", "[ab]+"),
)


def test_every_field_comes_back_as_it_was():
    plain = SamplingParams(max_tokens=1)
    same = [field.name for field in fields(plain) if getattr(plain, field.name) == getattr(FULL, field.name)]
    assert not same, "a field that is never set proves nothing"
    for params in (plain, FULL, replace(FULL, logprobs=None), replace(FULL, prompt_logprobs=0)):
        wire = sampling_to_wire(params).SerializeToString()
        assert sampling_from_wire(common_pb2.SamplingParams.FromString(wire)) == params


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("nan")),
        ("min_p", 1.5),
        ("frequency_penalty", float("inf")),
        ("presence_penalty", float("nan")),
        ("logit_bias", {3: float("inf")}),
        ("bad_word_ids", [common_pb2.TokenIds()]),
    ],
)
def test_what_would_break_a_worker_is_refused(field, value):
    message = common_pb2.SamplingParams(max_tokens=1, seed=1, **{field: value})
    with pytest.raises(InvalidRequest):
        sampling_from_wire(message)


def test_logprobs_come_back_as_they_were():
    told = (TokenLogprobs(5, -0.5, 2, ((7, -0.25), (5, -0.5))), TokenLogprobs(0, -1.5, 9, ()))
    assert logprobs_from_wire(logprobs_to_wire(told)) == told
