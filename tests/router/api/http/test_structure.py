"""JSON of requests: what is too much is refused before it is built; the rest is what `json` makes of it."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twostroke.core.errors import InvalidRequest
from twostroke.router.api.http import structure
from twostroke.router.api.http.structure import SLICE_BYTES, Bounds, built, finished
from twostroke.router.api.ignored import Ignored
from twostroke.router.api.messages import check_messages
from twostroke.router.api.openai_requests import json_object

_FILE = Path(__file__).parents[4] / "bench/hostile/http_inputs.py"
_SPEC = importlib.util.spec_from_file_location("http_inputs", _FILE)
assert _SPEC
assert _SPEC.loader
http_inputs = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(http_inputs)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The length of every text that `json` was given."""
    lengths: list[int] = []
    loads = structure._loads

    def noted(data: Any, offset: int = 0) -> Any:
        lengths.append(len(data))
        return loads(data, offset)

    monkeypatch.setattr(structure, "_loads", noted)
    return lengths


def test_hostile_bodies_are_refused_before_anything_is_built_or_built_in_slices(loaded: list[int]):
    for body in http_inputs.bodies():
        assert len(body.data) <= 4 << 20
        loaded.clear()
        if body.is_bounded:
            with pytest.raises(InvalidRequest, match="at most"):
                finished(json_object(bytearray(body.data)))
            assert loaded == [], body.name
        elif body.name in ("integers of 4,300 digits", "mixed prompt"):
            finished(json_object(bytearray(body.data)))
            assert max(loaded) <= SLICE_BYTES + 2, body.name


def test_a_prompt_of_half_a_million_token_ids_is_built(loaded: list[int]):
    ids = list(range(100_000, 100_000 + (1 << 19)))
    assert finished(built(json.dumps({"prompt": ids}).encode())) == {"prompt": ids}
    assert max(loaded) <= SLICE_BYTES + 2


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text('"\\[{,:é', max_size=3), inner, max_size=5),
    max_leaves=25,
)


@settings(max_examples=60, deadline=None)
@given(VALUES, st.booleans(), st.sampled_from([None, 1]))
def test_slices_make_what_json_makes(value: Any, is_ascii: bool, indent: int | None):
    text = json.dumps(value, ensure_ascii=is_ascii, indent=indent).encode(errors="surrogatepass")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(structure, "SLICE_BYTES", 5)
        try:
            expected = json.loads(text.decode())
        except UnicodeDecodeError:
            return
        assert finished(built(text)) == expected


@pytest.mark.parametrize(
    "text",
    ["[1,2,3,]", "[,1,2,3]", "[1,,2,3]", "[1,2,3}", '{"a":1,"b":2]', '{"a":1,"b":2,}', '{"a" 1,"b":[1,2]}', "[1,2] [3]",
     "[1,2,3", "1,2,3]", '{1:[1,2,3]}', "[1,NaN,2]", '["aaaaaaa]', '{"a":1}}', '{"aaaaaa":[1,2,3] 4}', '{[1,2,3]}'],
)  # fmt: skip
def test_what_is_no_json_is_none_in_slices(text: str):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(structure, "SLICE_BYTES", 3)
        with pytest.raises(ValueError):
            finished(built(text.encode()))


def test_the_last_of_equal_keys_counts():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(structure, "SLICE_BYTES", 3)
        assert finished(built(b'{"a":1,"b":[1,2,3],"a":[4,5,6]}')) == {"a": [4, 5, 6], "b": [1, 2, 3]}


@pytest.mark.parametrize("bounds", [Bounds(containers=2), Bounds(keys=1), Bounds(commas=2), Bounds(depth=2)])
def test_each_bound_counts_what_stands_outside_strings(bounds: Bounds):
    text = b'{"a": [[1, 2], 3], "b": "[{,:"}'
    finished(structure.scanned(text, Bounds(containers=3, keys=2, commas=3, depth=3)))
    with pytest.raises(InvalidRequest, match="at most"):
        finished(structure.scanned(text, bounds))


def test_arguments_of_many_calls_are_bounded_together():
    text = "[" + "[]," * 1300 + "[]]"
    call = {"type": "function", "function": {"name": "a", "arguments": text}}
    with pytest.raises(InvalidRequest, match="arguments hold"):
        check_messages([{"role": "assistant", "tool_calls": [call] * 26}], Ignored())
    quoted = {"type": "function", "function": {"name": "a", "arguments": json.dumps({"file": text})}}
    check_messages([{"role": "assistant", "tool_calls": [quoted] * 26}], Ignored())


def test_a_number_of_too_many_digits_is_refused_in_words_for_a_client():
    with pytest.raises(ValueError, match="more than 4300 digits") as refused:
        finished(built(b'{"seed": ' + b"9" * 5_000 + b"}"))
    assert "sys." not in str(refused.value)
