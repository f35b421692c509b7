"""Long texts: the same tokens in pieces as in one, refusals before most of them is tokenised, nobody held up."""

from __future__ import annotations

import pytest
from kinds import MAKERS, bundled, byte_level, each_tokenizer
from long_texts import mixed_text
from real_models import VOCABULARIES, real_models

from twostroke.core.errors import InvalidRequest
from twostroke.text import cuts as cuts_module
from twostroke.text import tokenizer as tokenizer_module
from twostroke.text.tokenizer import Tokenizer, TooManyTokens


@pytest.fixture
def small_pieces(monkeypatch):
    """As many cuts in a short text as a long one would have."""
    monkeypatch.setattr(cuts_module, "PIECE_CHARS", 160)


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """Characters of every text that is tokenised from now on, but for the surroundings of cuts."""
    sizes: list[int] = []

    def counted(backend, texts, add_special_tokens):
        sizes.append(len(texts[0]))
        return cuts_module.encode_all(backend, texts, add_special_tokens)

    monkeypatch.setattr(tokenizer_module, "encode_all", counted)
    return sizes


@each_tokenizer
def test_a_long_text_has_the_tokens_that_it_has_in_one_piece(make, small_pieces):
    tokenizer = make()
    for seed in range(20):
        text = mixed_text(seed, 1500)
        for special in (True, False):
            whole = tokenizer.backend.encode(text, add_special_tokens=special).ids
            assert tokenizer.encode(text, special) == whole


@pytest.mark.parametrize("name", VOCABULARIES)
def test_real_vocabularies_are_cut_where_no_token_reaches_across(name, small_pieces, encoded):
    tokenizer = Tokenizer.load(real_models() / f"ggml-vocab-{name}.gguf")
    tokenizer.prepare()
    encoded.clear()
    for seed in range(10):
        text = mixed_text(seed, 3000)
        assert tokenizer.encode(text) == tokenizer.backend.encode(text).ids
    assert len(encoded) > 50  # and not as a whole


@pytest.mark.parametrize("make", [byte_level, bundled])
def test_tokens_of_a_long_text_begin_where_they_begin_in_one_piece(make, monkeypatch):
    tokenizer, texts = make(), [mixed_text(seed, 1500) for seed in range(10)]
    whole = [tokenizer.places(text) for text in texts]
    monkeypatch.setattr(cuts_module, "PIECE_CHARS", 160)
    assert [tokenizer.places(text) for text in texts] == whole


@each_tokenizer
def test_no_text_has_fewer_tokens_than_its_bytes_say(make):
    tokenizer = make()
    blanks = [" " * 500, "\n" * 500, "a" * 500, " a" * 300, "\u3000" * 99, "e\u0301" * 99, "<s>" * 50, "<|eos|>  " * 50]
    for text in [*blanks, *(mixed_text(seed, 800) for seed in range(20))]:
        assert tokenizer.least_tokens(text) <= len(tokenizer.backend.encode(text, add_special_tokens=False).ids)


def test_some_tokenizers_do_bound_it():
    known = {make.__name__: make().least_tokens("abc " * 1000) for make in MAKERS}
    assert known["bundled"] > 0
    assert known["byte_level"] > 0
    assert known["word_piece"] == known["words_apart"] == 0  # a word of any length may be one unknown token


@pytest.mark.parametrize(
    "text", [" " * 4_000_000 + "1", "a" * 4_000_000, "word " * 800_000], ids=["blanks", "a", "words"]
)
def test_what_cannot_fit_by_its_bytes_is_not_tokenised_at_all(text, encoded):
    tokenizer = bundled()
    tokenizer.prepare()
    encoded.clear()
    with pytest.raises(TooManyTokens) as caught:
        tokenizer.encode(text, most=4096)
    assert encoded == []
    assert caught.value.least > 4096


def test_a_text_is_tokenised_no_further_than_to_what_fits(encoded):
    tokenizer = bundled()
    text = mixed_text(1, 100_000)
    assert tokenizer.least_tokens(text) < 5_000 < len(tokenizer.backend.encode(text).ids) / 3
    encoded.clear()
    with pytest.raises(TooManyTokens):
        tokenizer.encode(text, most=5_000)
    assert sum(encoded) <= 2 * cuts_module.PIECE_CHARS
    assert max(encoded) <= cuts_module.PIECE_CHARS


def test_what_fits_exactly_is_not_too_much():
    tokenizer = bundled()
    text = mixed_text(1, 40_000)
    ids = tokenizer.encode(text)
    assert tokenizer.encode(text, most=len(ids)) == ids
    with pytest.raises(TooManyTokens):
        tokenizer.encode(text, most=len(ids) - 1)


def test_a_stretch_without_a_place_to_cut_is_bounded(encoded):
    tokenizer = bundled()
    tokenizer.prepare()
    encoded.clear()
    stretch = "x" * (cuts_module.MAX_UNCUT_CHARS + cuts_module.PIECE_CHARS)
    with pytest.raises(InvalidRequest, match="without a space between words or a line break"):
        tokenizer.encode("some words before it " * 1000 + stretch + " and behind it")
    assert max(encoded) <= cuts_module.PIECE_CHARS
