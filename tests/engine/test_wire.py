"""Values as bytes and back: every command and event, plans, and what is no value."""

import dataclasses
import typing

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twostroke.core.request import FinishReason, Role, SamplingParams, SequenceKey, TokenLogprobs
from twostroke.core.tally import Spread
from twostroke.engine.link import messages as m
from twostroke.engine.link.wire import CLASSES, WireError, decode, encode
from twostroke.engine.plan import History, SequenceStep, StepPlan, StepResult
from twostroke.kv.section import SectionData

KEY = SequenceKey("r\ud83d", 3)
SECTION = SectionData(
    *("main", "k", 0, 2, 0, 1, 1, 8),
    np.arange(2 * 1 * 16 * 8, dtype=np.uint8).reshape(2, 1, 16, 8),
    None,
    np.full((2, 1, 1), 1 << 63, dtype=np.uint64),
)
PARAMS = SamplingParams(
    9, 0.5, seed=(1 << 63) - 1, stop=("é",), logit_bias=((1, -2.5),), bad_words=((1, 2),), logprobs=0
)
LOGPROBS = (TokenLogprobs(5, -0.25, 1, ((5, -0.25), (7, float("-inf")))),)
STEP = SequenceStep(
    *(KEY, 16, (1, 2, 3), tuple(range(70_000, 70_040)), (0,) * 40, True, PARAMS, 2),
    history=History((1,), ()),
    targets=(4, 5, 6, 7),
)
VALUES = [
    m.Submit(KEY, m.Source.FOR_PEER, tuple(range(100)), (b"i" * 16,), b"root", PARAMS, deadline_s=1.5),
    m.CancelSequence(KEY, FinishReason.STOP),
    m.WriteKv(KEY, 0, 16, (SECTION,)),
    m.PrefillLocally(KEY, 16, None),
    m.AskSnapshot(),
    m.SetRole(Role.COMBINED),
    m.LoadAdapter(3, "/adapters/é", b"d" * 16),
    m.AdapterRefused(3, "checkpoint_error", "why"),
    m.StepTokens(7, (m.TokenNews(KEY, 0, (5,), LOGPROBS, LOGPROBS, 0.1),)),
    m.KvRead(KEY, 0, 16, None),
    m.CacheDelta(3, (b"a" * 16,), ()),
    m.LoadNews("idle", *[1] * 9, *[0.5] * 3, (("steps", 1 << 40),), spreads=(("x", Spread((1, 2), 3.0)),)),
    StepPlan(3, (STEP,)),
    StepResult(3, ((5,), ()), frozenset({KEY}), {KEY: LOGPROBS}, failed={KEY: "why"}),
]


def same(a: object, b: object) -> bool:
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)
    if dataclasses.is_dataclass(a):
        names = [field.name for field in dataclasses.fields(a)]
        return type(a) is type(b) and all(same(getattr(a, name), getattr(b, name)) for name in names)
    if isinstance(a, tuple) and type(a) is type(b):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_a_value_comes_back_as_it_was(value):
    assert same(decode(encode(value)), value)


def test_every_command_and_event_has_a_number():
    for union in (m.Command, m.Event):
        assert set(typing.get_args(union)) <= set(CLASSES)
    assert len(set(CLASSES)) == len(CLASSES) < 256


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=6).map(tuple) | st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner)
    ),
)


@given(PLAIN)
def test_any_plain_value_comes_back(value):
    assert same(decode(encode(value)), value)


@given(st.sampled_from(VALUES), st.data())
def test_bytes_that_are_cut_or_changed_give_an_error_or_another_value(value, data):
    whole = bytearray(encode(value))
    with pytest.raises(WireError):
        decode(bytes(whole[: data.draw(st.integers(0, len(whole) - 1))]))
    with pytest.raises(WireError):
        decode(bytes(whole) + b"N")
    whole[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        decode(bytes(whole))
    except WireError:
        pass


@pytest.mark.parametrize("value", [object(), (1, {2}), m.Stop, lambda: 0])
def test_what_is_no_plain_value_is_refused(value):
    with pytest.raises(WireError, match="no plain value"):
        encode(value)


@pytest.mark.parametrize("edge", [-1, 0, 2**32 - 1, 2**32])
def test_numbers_at_the_edge_of_what_is_packed_come_back(edge):
    for place in range(4):
        values = (1,) * place + (edge,) + (1,) * (3 - place)
        assert decode(encode(values)) == values


@pytest.mark.parametrize("dtype", ["i4,(", "<04", ",f4", "|O", "V0", "(9999999999,)i4"])
def test_an_array_whose_dtype_is_none_is_malformed(dtype):
    good = encode(np.zeros(2, "<f4"))
    written = b"a" + len(dtype).to_bytes(4, "little") + dtype.encode() + good[good.index(b"<f4") + 3 :]
    with pytest.raises(WireError):
        decode(written)
