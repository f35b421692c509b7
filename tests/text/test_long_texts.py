"""Long texts: the same tokens in pieces as in one, refusals before most of them is tokenised, nobody held up."""

from __future__ import annotations

import random

import pytest
import tokenizers
from support.checkpoints.kinds import MAKERS, bundled, byte_level, each_tokenizer
from support.checkpoints.long_texts import mixed_text
from support.checkpoints.real_models import VOCABULARIES, real_models
from support.session.ticking import ticked_while
from tokenizers import Regex, pre_tokenizers

from twostroke.core.errors import InvalidRequest
from twostroke.text import cuts as cuts_module
from twostroke.text import tokenizer as tokenizer_module
from twostroke.text.gguf_words import RULES
from twostroke.text.slow_patterns import MAX_BLANKS
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


def test_other_threads_have_their_turn_while_one_piece_is_tokenised():
    """A piece as long as no other, so that it is the library which frees the GIL and not the end of a piece."""
    backend, text = bundled().backend, mixed_text(2, 1_000_000)
    assert ticked_while(lambda: cuts_module.encode_all(backend, [text], False)).share < 0.5


def test_the_ticking_thread_sees_who_holds_the_gil():
    text = mixed_text(2, 300_000)
    assert ticked_while(lambda: bundled().backend.encode(text)).share > 0.5


def test_trailing_blanks_are_found_as_before_and_in_linear_time():
    def cuts(pattern: str) -> pre_tokenizers.Sequence:
        rules = [pattern if "$" in rule else rule for rule in RULES["deepseek-llm"].patterns]
        return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(rule), "isolated") for rule in rules])

    (ours,) = (rule for rule in RULES["deepseek-llm"].patterns if "$" in rule)
    draw, old, new = random.Random(1), cuts(r"\s+$"), cuts(ours)
    for _ in range(500):
        few = [" " * draw.randint(1, 4), " " * draw.randint(1, 200), "\n", "\r", "\t", "\x85", "\u3000", *"a1。中!"]
        text = "".join(draw.choices(few, k=draw.randint(1, 12)))
        assert old.pre_tokenize_str(text) == new.pre_tokenize_str(text)
    quick = ticked_while(lambda: new.pre_tokenize_str(" " * 30_000 + "1")).work_s
    slow = ticked_while(lambda: old.pre_tokenize_str(" " * 10_000 + "1")).work_s
    assert quick < slow  # although three times as long


@pytest.mark.parametrize(("pattern", "is_bounded"), [(r"\s+$", False), (r"\p{N}|\s+$", True), (r"\s+(?!\S)", False)])
def test_a_slow_pattern_of_a_file_is_replaced_or_its_runs_of_blanks_are_bounded(tmp_path, pattern, is_bounded):
    backend = tokenizers.Tokenizer.from_str(bundled().backend.to_str())
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    for text in ("a  \n  b  ", " " * 200 + "\n", "x" + " " * 200 + "1", "  \n \n  x  "):
        assert tokenizer.encode(text) == backend.encode(text).ids
    text = "x" + " " * (MAX_BLANKS + 1) + "1"
    if not is_bounded:
        assert tokenizer.encode(text)
        return
    with pytest.raises(InvalidRequest, match=f"{MAX_BLANKS + 1} blanks in a row at character 1;.*at most {MAX_BLANKS}"):
        tokenizer.encode(text)
