"""Which tokens have their text out, and so their logprobs: stop strings withhold, cut, or are waited for."""

import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from twostroke.text.stop import StopText
from twostroke.text.stream import TextStream
from twostroke.text.token_text import TokenTexts
from twostroke.text.tokenizer import Tokenizer


def byte_level() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["</s>"])
    return Tokenizer(backend, {}, [256])


def metaspace() -> Tokenizer:
    vocab = {"<unk>": 0, "▁Hel": 1, "lo": 2, "▁": 3, "▁wor": 4, "ld": 5, **{f"<0x{b:02X}>": 6 + b for b in range(256)}}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(backend, {}, [])


TOKENIZER = byte_level()


def shown_after_each(text: str, **options) -> tuple[str, list[int], TextStream]:
    stream = TextStream(TOKENIZER, **options)
    ids = TOKENIZER.encode(text)
    said, shown = "", []
    for id_ in ids:
        said += stream.push([id_]).text
        shown.append(stream.num_shown)
        if stream.is_stopped:
            break
    said += stream.flush()
    return said, [*shown, stream.num_shown], stream


def test_a_token_is_shown_when_its_text_is_out():
    said, shown, _ = shown_after_each("abc")
    assert (said, shown) == ("abc", [1, 2, 3, 3])


def test_what_may_begin_a_stop_string_is_not_shown_until_it_is_none():
    said, shown, _ = shown_after_each("abxyab", stop=["xyz"])
    assert (said, shown) == ("abxyab", [1, 2, 2, 2, 5, 6, 6])


def test_what_a_stop_string_cuts_off_is_never_shown():
    said, shown, _ = shown_after_each("abxyzab", stop=["xyz"])
    assert (said, shown) == ("ab", [1, 2, 2, 2, 2, 2])


def test_withheld_text_that_the_end_sets_free_is_shown_then():
    said, shown, _ = shown_after_each("abxy", stop=["xyz"])
    assert (said, shown) == ("abxy", [1, 2, 2, 2, 4])


def test_an_included_stop_string_is_shown():
    said, shown, _ = shown_after_each("abxyzab", stop=["xyz"], include_stop=True)
    assert (said, shown) == ("abxyz", [1, 2, 2, 2, 5, 5])


def test_bytes_of_a_character_are_shown_with_it():
    said, shown, _ = shown_after_each("a€b")
    assert (said, shown) == ("a€b", [1, 1, 1, 4, 5, 5])
    said, shown, _ = shown_after_each("a€b", stop=["€"])
    assert (said, shown) == ("a", [1, 1, 1, 1, 1])


def test_a_token_cut_in_two_is_shown():
    backend = tokenizers.Tokenizer(models.WordLevel(vocab={"one\n": 0, "two": 1, "<u>": 2}, unk_token="<u>"))
    backend.decoder = decoders.Fuse()
    stream = TextStream(Tokenizer(backend, {}, []), ["\n"])
    assert stream.push([1, 0]).text == "twoone"
    assert stream.is_stopped
    assert stream.num_shown == 2


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.text("abc€", max_size=20), st.lists(st.text("abc€", min_size=1, max_size=3), max_size=2), st.booleans())
def test_shown_tokens_never_tell_of_text_that_is_not_out(text, stops, include):
    said, shown, stream = shown_after_each(text, stop=stops, include_stop=include)
    ids = TOKENIZER.encode(text)
    assert shown == sorted(shown)
    assert TOKENIZER.decode(ids[: stream.num_shown]) == said


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.text("ab", max_size=14), st.lists(st.text("ab", min_size=1, max_size=3), max_size=2), st.integers(0, 8))
def test_stop_strings_count_from_the_token_after_min_tokens(text, stops, min_tokens):
    """The first stop string that is complete with a later token than the `min_tokens`-th; it may begin before."""
    said, _, _ = shown_after_each(text, stop=stops, min_tokens=min_tokens)
    ends = [
        (end, -len(stop))
        for stop in stops
        for end in range(max(min_tokens + 1, len(stop)), len(text) + 1)
        if text[end - len(stop) : end] == stop
    ]
    assert said == (text[: min(ends)[0] + min(ends)[1]] if ends else text)


def test_a_short_stop_string_within_what_a_longer_one_withheld_is_not_found_late():
    stop = StopText(["abcd", "bc"])
    assert stop.push("abc", may_stop=False).text == ""
    assert stop.push("x").text == "abcx"
    assert not stop.is_stopped


def test_tokens_by_themselves_have_text_and_bytes():
    texts = TokenTexts(TOKENIZER)
    assert [texts.of(i).raw for i in TOKENIZER.encode("é")] == [b"\xc3", b"\xa9"]
    assert texts.of(TOKENIZER.encode("é")[0]).text == "\ufffd"
    assert texts.of(256) == ("</s>", b"</s>")
    assert texts.of(99_999) == ("", b"")


def test_a_word_token_keeps_its_space_and_a_byte_token_is_its_byte():
    texts = TokenTexts(metaspace())
    assert [texts.of(i).text for i in (1, 2, 3, 4)] == [" Hel", "lo", " ", " wor"]
    assert texts.of(6 + 0xC3).raw == b"\xc3"


def test_text_that_the_end_sets_free_stops_only_behind_min_tokens():
    half = TOKENIZER.encode("\u00e9")[:1]  # the first of two bytes: a replacement character once the text ends
    for min_tokens, text, is_stopped in ((0, "", True), (1, "\ufffd", False), (5, "\ufffd", False)):
        stream = TextStream(TOKENIZER, ["\ufffd"], min_tokens=min_tokens)
        assert stream.push(half).text == ""
        assert (stream.flush(), stream.is_stopped) == (text, is_stopped)
