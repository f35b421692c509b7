"""Growing text against the whole text decoded at once, on tokenizers trained here and on the bundled model's."""

from __future__ import annotations

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpoints.kinds import byte_level, each_tokenizer, gemma_style, lengths_decoded, llama_style, metaspace
from tokenizers import decoders

from twostroke.core.errors import CheckpointError, InvalidRequest
from twostroke.text.incremental import IncrementalText
from twostroke.text.stop import StopText
from twostroke.text.stream import TextStream
from twostroke.text.tokenizer import Tokenizer


def grow(tokenizer: Tokenizer, ids: list[int], sizes: list[int], skip: bool = True) -> str:
    """Push `ids` in pieces; at every step, what was given out must be the start of the whole text so far."""
    text = IncrementalText(tokenizer, skip)
    given_out, place = "", 0
    whole = tokenizer.decode(ids, skip)
    while place < len(ids):
        size = sizes[place % len(sizes)]
        given_out += text.push(ids[place : place + size])
        place += size
        assert tokenizer.decode(ids[:place], skip).startswith(given_out)
        assert whole.startswith(given_out)
    return given_out + text.flush()


sizes_of_pushes = st.lists(st.integers(1, 4), min_size=1, max_size=5)


@each_tokenizer
@settings(max_examples=80, deadline=None)
@given(text=st.text(max_size=40), sizes=sizes_of_pushes)
def test_any_text_grows_to_what_decoding_it_at_once_gives(make, text, sizes):
    tokenizer = make()
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert grow(tokenizer, ids, sizes) == tokenizer.decode(ids)


@each_tokenizer
@settings(max_examples=150, deadline=None)
@given(data=st.data(), sizes=sizes_of_pushes, skip=st.booleans())
def test_any_ids_grow_to_what_decoding_them_at_once_gives(make, data, sizes, skip):
    # Models also produce what no encoder would: broken UTF-8, special tokens within, ids beyond the vocabulary.
    tokenizer = make()
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=30))
    assert grow(tokenizer, ids, sizes, skip) == tokenizer.decode(ids, skip)


@pytest.mark.parametrize("make", [llama_style, gemma_style, metaspace], ids=lambda make: make.__name__)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_runs_of_spaces_bytes_and_specials_grow_right(make, data):
    tokenizer = make()
    names = ["▁", "<s>", "</s>", "<0xE2>", "<0x82>", "<0xAC>", "<0xFF>", "<0x20>", "e"]
    pool = [tokenizer.backend.token_to_id(name) for name in names]
    assert None not in pool
    ids = data.draw(st.lists(st.sampled_from(pool), max_size=14))
    assert grow(tokenizer, ids, [1]) == tokenizer.decode(ids)


def test_text_is_given_out_as_soon_as_it_is_final():
    tokenizer = byte_level()
    text = IncrementalText(tokenizer)
    pieces = [text.push([id_]) for id_ in tokenizer.encode("a👩b", add_special_tokens=False)]
    assert pieces[0] == "a"
    assert set(pieces[1:-2]) == {""}  # three of the emoji's four bytes say nothing yet
    assert pieces[-2:] == ["👩", "b"]


def test_broken_bytes_are_not_withheld_for_ever():
    tokenizer = byte_level()
    text = IncrementalText(tokenizer)
    broken = tokenizer.backend.token_to_id("ÿ")  # the byte FF, which starts nothing
    assert [text.push([broken]) for _ in range(3)] == ["�"] * 3


def test_a_token_is_decoded_a_bounded_number_of_times(monkeypatch):
    tokenizer = llama_style()
    lengths = lengths_decoded(monkeypatch)
    text = IncrementalText(tokenizer)
    euro = [tokenizer.backend.token_to_id(f"<0x{byte:02X}>") for byte in "€".encode()]
    for id_ in [*tokenizer.encode("the lazy dog " * 100, False), *(euro * 500)]:
        text.push([id_])
    text.flush()
    assert sum(lengths) < 4 * 4000


def test_a_decoder_that_rewrites_given_text_is_refused_by_name():
    backend = tokenizers.Tokenizer.from_str(llama_style().backend.to_str())
    for decoder, name in (
        (decoders.CTC(), "CTC"),
        (decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 0, 1)]), r"Strip\(0, 1\)"),
        (decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "c")]), r"Fuse \+ Replace"),
    ):
        backend.decoder = decoder
        with pytest.raises(CheckpointError, match=name):
            IncrementalText(Tokenizer(backend, {}, ()))


# ---------------------------------------------------------------- stop strings


def first_complete(text: str, stops: list[str]) -> int | None:
    """The naive oracle: where the first stop string to be complete begins."""
    for end in range(1, len(text) + 1):
        found = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if found:
            return min(found)
    return None


few = st.text("abc", max_size=30)


@settings(max_examples=400, deadline=None)
@given(text=few, stops=st.lists(st.text("abc", min_size=1, max_size=5), max_size=3), cuts=sizes_of_pushes)
def test_stops_where_a_search_of_the_whole_text_would(text, stops, cuts):
    stop = StopText(stops)
    seen, place = "", 0
    while place < len(text) and not stop.is_stopped:
        size = cuts[place % len(cuts)]
        seen += stop.push(text[place : place + size]).text
        place += size
        assert text.startswith(seen)
    seen += stop.flush()
    expected = first_complete(text, stops)
    assert stop.is_stopped == (expected is not None)
    assert seen == (text if expected is None else text[:expected])


@settings(max_examples=200, deadline=None)
@given(text=few, stops=st.lists(st.text("abc", min_size=1, max_size=5), max_size=3))
def test_withholds_nothing_that_cannot_begin_a_stop_string(text, stops):
    stop = StopText(stops)
    seen = pushed = ""
    for character in text:
        seen += stop.push(character).text
        pushed += character
        withheld = pushed[len(seen) :]
        assert stop.is_stopped or withheld == "" or any(other.startswith(withheld) for other in stops)


@each_tokenizer
@settings(max_examples=80, deadline=None)
@given(text=st.text("ab €👩\n", max_size=25), stops=st.lists(st.text("ab €👩\n", min_size=1, max_size=3), max_size=2))
def test_tokens_up_to_the_stop_string_count_and_no_more(make, text, stops):
    tokenizer = make()
    ids = tokenizer.encode(text, add_special_tokens=False)
    stream = TextStream(tokenizer, stops)
    piece = stream.push(ids)
    shown = piece.text + stream.flush()
    whole = tokenizer.decode(ids)
    expected = first_complete(whole, stops)
    assert shown == (whole if expected is None else whole[:expected])
    if piece.is_stopped:
        assert expected is not None
        without_last = TextStream(tokenizer, stops)
        assert not without_last.push(ids[: piece.num_tokens - 1]).is_stopped
    else:
        assert piece.num_tokens == len(ids)
    one_by_one = TextStream(tokenizer, stops)
    assert "".join(one_by_one.push([id_]).text for id_ in ids) + one_by_one.flush() == shown


def test_a_stop_string_is_found_across_token_edges():
    tokenizer = byte_level()
    ids = [*tokenizer.encode("return a\n\nde", False), *tokenizer.encode("f add", False)]
    stream = TextStream(tokenizer, ["\n\ndef"])
    pieces = [stream.push([id_]) for id_ in ids]
    assert "".join(piece.text for piece in pieces) == "return a"
    assert stream.is_stopped
    assert stream.flush() == ""


def test_an_empty_stop_string_is_refused():
    with pytest.raises(InvalidRequest) as caught:
        StopText(["x", ""])
    assert caught.value.param == "stop"
