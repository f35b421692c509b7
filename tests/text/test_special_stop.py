"""Stop strings that name special tokens, whether these give text or not."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpoints.kinds import byte_level, llama_style

from twostroke.text.stream import TextStream
from twostroke.text.tokenizer import Tokenizer

NAMES = ["<|bos|>", "<|eos|>"]
TOKENIZER = byte_level()
BOS, EOS = (TOKENIZER.backend.token_to_id(name) for name in NAMES)


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text)


def said(text: str, stop: list[str], tokenizer: Tokenizer = TOKENIZER, **options: object) -> tuple[str, bool, int]:
    """Text, whether it stopped, and how many tokens count."""
    stream = TextStream(tokenizer, stop, **options)  # type: ignore[arg-type]
    piece = stream.push(tokenizer.encode(text, add_special_tokens=False))
    tail = stream.flush()
    return piece.text + tail, stream.is_stopped, piece.num_tokens


@pytest.mark.parametrize(
    ("text", "stop", "seen", "included"),
    [
        ("ab<|eos|>c", ["<|eos|>"], "ab", "ab<|eos|>"),
        ("a<|bos|>b<|eos|>c", ["<|eos|>"], "ab", "ab<|eos|>"),
        ("ab<|eos|>\nc", ["<|eos|>\n"], "ab", "ab<|eos|>\n"),
        ("ab<|eos|>c\n", ["<|eos|>\n"], "abc\n", "abc\n"),  # it is not whole
        ("ab<|eos|>", ["b<|eos|>"], "a", "ab<|eos|>"),
        ("a<|bos|><|eos|>b", ["<|bos|><|eos|>"], "a", "a<|bos|><|eos|>"),
        ("a<|bos|>b<|eos|>c", ["b<|eos|>"], "a", "ab<|eos|>"),
        ("ab<c", ["<", "<|eos|>"], "ab", "ab<"),
        ("a<|bos|>b", ["<", "|"], "ab", "ab"),  # what gives no text is no text to be searched
        ("abc", ["<|eos|>"], "abc", "abc"),
    ],
)
def test_a_special_token_without_text_stops_where_a_stop_string_names_it(text, stop, seen, included):
    assert said(text, stop)[0] == seen
    assert said(text, stop, include_stop=True)[0] == included
    stream = TextStream(TOKENIZER, stop)
    assert "".join(stream.push([id_]).text for id_ in ids(text)) + stream.flush() == seen


def test_the_token_that_stops_counts_and_those_behind_it_do_not():
    assert said("ab<|eos|>cd", ["<|eos|>"]) == ("ab", True, 3)


def test_a_stop_string_that_ordinary_tokens_spell_stops_too():
    spelt = TOKENIZER.backend.from_str(TOKENIZER.backend.to_str())
    spelt.encode_special_tokens = True
    stream = TextStream(TOKENIZER, ["<|eos|>"])
    piece = stream.push(spelt.encode("ab<|eos|>c").ids)
    assert (piece.text, piece.is_stopped) == ("ab", True)


def test_special_tokens_that_give_text_are_matched_in_it():
    assert said("ab<|eos|>c", ["|eos|>"], skip_special_tokens=False)[0] == "ab<"
    assert said("ab<|eos|>c", ["<|eos|>"], skip_special_tokens=False, include_stop=True)[0] == "ab<|eos|>"
    assert said("ab<|eos|>c", [], skip_special_tokens=False)[0] == "ab<|eos|>c"
    assert said("ab<|eos|>c", ["<|eos|>d"], skip_special_tokens=False)[0] == "ab<|eos|>c"


def test_min_tokens_holds_them_back_as_any_stop_string():
    assert said("a<|eos|>b<|eos|>c", ["<|eos|>"], min_tokens=2)[0] == "ab"


def test_what_waits_for_its_rest_comes_before_the_token_that_stops():
    """Byte tokens wait until their run ends; a stop ends it."""
    tokenizer = llama_style()
    stream = TextStream(tokenizer, ["</s>"], include_stop=True)
    euro = [tokenizer.backend.token_to_id(f"<0x{byte:02X}>") for byte in "€".encode()]
    assert stream.push([*euro, tokenizer.eos_id]).text == "€</s>"
    broken = TextStream(TOKENIZER, ["<|eos|>"])
    assert broken.push([*ids("a"), TOKENIZER.backend.token_to_id("â"), EOS]).text == "a\ufffd"


text_with_specials = st.lists(st.sampled_from(["a", "b", "<|bos|>", "<|eos|>"]), max_size=12).map("".join)
stops = st.lists(st.sampled_from(["a", "b", "<|eos|>"]), min_size=1, max_size=3).map("".join)


@settings(max_examples=150, deadline=None)
@given(text=text_with_specials, stop=st.lists(stops, max_size=2), include=st.booleans())
def test_it_stops_where_the_written_text_would_without_the_tokens_that_no_stop_string_names(text, stop, include):
    written = text.replace("<|bos|>", "")
    if not any("<|eos|>" in one for one in stop):
        written = written.replace("<|eos|>", "")
    ends = [(end, end - len(s)) for s in stop for end in range(len(s), len(written) + 1) if written[:end].endswith(s)]
    expected = written
    if ends:
        end, start = min(ends)
        expected = written[:start].replace("<|eos|>", "") + (written[start:end] if include else "")
    else:
        expected = written.replace("<|eos|>", "")
    assert said(text, stop, include_stop=include)[0] == expected
