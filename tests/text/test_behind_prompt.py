"""A text that starts behind a prompt: what all ids decode to, less what the prompt's decode to."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.checkpoints.kinds import (
    bundled,
    byte_level,
    each_tokenizer,
    gemma_style,
    lengths_decoded,
    llama_style,
    metaspace,
)

from twostroke.text.incremental import IncrementalText
from twostroke.text.places import TokenPlaces
from twostroke.text.stream import TextStream
from twostroke.text.tokenizer import Tokenizer

each_spaced = pytest.mark.parametrize("make", [llama_style, metaspace], ids=lambda make: make.__name__)
BYTES = ["<0xE6>", "<0x97>", "<0xA5>", "<0xE2>", "<0x82>", "<0xAC>", "<0xFF>", "<0x20>", "<0x41>", "▁", "e", "<s>"]


def by_definition(tokenizer: Tokenizer, prompt: list[int], output: list[int], skip: bool) -> str:
    """Worked out on whole texts, with the two cases where the longer one does not begin with the shorter one."""
    kept = [id_ for id_ in prompt if tokenizer.token(id_) and not (skip and id_ in tokenizer.special_ids)]
    if kept and all(id_ in tokenizer.byte_by_id for id_ in kept):
        # The space that decoders strip from the beginning of a text is no part of the question.
        prompt = kept = [tokenizer.backend.token_to_id("e"), *kept]
    before, whole = tokenizer.decode(prompt, skip), tokenizer.decode([*prompt, *output], skip)
    if whole.startswith(before):
        return whole[len(before) :]
    if not tokenizer.byte_by_id:  # the output completes a character
        return _less(whole, before)
    # The prompt ends with a run of byte tokens. Something that is none stands between them and the output, but for a
    # character that they began.
    run: list[int] = []
    while kept and kept[-1] in tokenizer.byte_by_id:
        run.insert(0, kept.pop())
    data = bytes(tokenizer.byte_by_id[id_] for id_ in run)
    begun = next(n for n in (0, 1, 2, 3) if _is_text(data[: len(data) - n]))
    between = tokenizer.backend.token_to_id("e")
    whole = tokenizer.decode([between, *run[len(run) - begun :], *output], skip)
    before = tokenizer.decode([between, *run[len(run) - begun :]], skip)
    return _less(whole, before)


def _less(whole: str, before: str) -> str:
    """Without what both begin with."""
    same = next(
        (n for n, (a, b) in enumerate(zip(whole, before, strict=False)) if a != b), min(len(whole), len(before))
    )
    return whole[same:]


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def grown(tokenizer: Tokenizer, prompt: list[int], output: list[int], sizes: list[int], skip: bool) -> str:
    text, said, place = IncrementalText(tokenizer, skip, prompt), "", 0
    while place < len(output):
        size = sizes[place % len(sizes)]
        said += text.push(output[place : place + size])
        place += size
    return said + text.flush()


sizes_of_pushes = st.lists(st.integers(1, 4), min_size=1, max_size=5)


@each_tokenizer
@settings(max_examples=80, deadline=None)
@given(data=st.data(), sizes=sizes_of_pushes, skip=st.booleans())
def test_any_output_behind_any_prompt_is_what_it_adds(make, data, sizes, skip):
    tokenizer = make()
    ids = st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=12)
    prompt, output = data.draw(ids), data.draw(ids)
    assert grown(tokenizer, prompt, output, sizes, skip) == by_definition(tokenizer, prompt, output, skip)


@pytest.mark.parametrize("make", [llama_style, gemma_style, metaspace, byte_level], ids=lambda make: make.__name__)
@settings(max_examples=120, deadline=None)
@given(data=st.data(), sizes=sizes_of_pushes, skip=st.booleans())
def test_characters_that_are_cut_between_prompt_and_output(make, data, sizes, skip):
    tokenizer = make()
    names = ["æ", "Ĺ", "¥", "â", "Ĥ", "¬", "ÿ", "Ġ", "e", "<|bos|>"] if make is byte_level else BYTES
    pool = [id_ for name in names if (id_ := tokenizer.backend.token_to_id(name)) is not None]
    assert len(pool) > 9 or make is metaspace
    ids = st.lists(st.sampled_from(pool), max_size=7)
    prompt, output = data.draw(ids), data.draw(ids)
    assert grown(tokenizer, prompt, output, sizes, skip) == by_definition(tokenizer, prompt, output, skip)


@each_tokenizer
@settings(max_examples=60, deadline=None)
@given(prompt=st.text("ab €日", max_size=12), output=st.text(" ab€日", max_size=12), data=st.data())
def test_a_text_that_is_taken_up_again_goes_on_as_it_was(make, prompt, output, data):
    """What a dispatch gave before its worker was lost is pushed again; then the rest comes."""
    tokenizer = make()
    prompt_ids, ids = tokenizer.encode(prompt), tokenizer.encode(output, add_special_tokens=False)
    cut = data.draw(st.integers(0, len(ids)))
    stop = data.draw(st.lists(st.text(" ab€", min_size=1, max_size=3), max_size=1))
    first, again = (TextStream(tokenizer, stop, prompt_ids=prompt_ids) for _ in range(2))
    given_out = first.push(ids[:cut]).text
    assert again.push(ids[:cut]).text == given_out
    assert again.push(ids[cut:]).text + again.flush() == first.push(ids[cut:]).text + first.flush()


@each_spaced
def test_the_first_word_keeps_its_space(make):
    tokenizer = make()
    (the,) = tokenizer.encode("the ", add_special_tokens=False)[:1]
    prompt = [tokenizer.bos_id, *tokenizer.encode("fox", add_special_tokens=False)]
    assert tokenizer.decode([the]).startswith("the")
    assert IncrementalText(tokenizer, prompt_ids=prompt).push([the]).startswith(" the")
    assert IncrementalText(tokenizer, prompt_ids=[tokenizer.bos_id]).push([the]).startswith("the")  # nothing before it
    stream = TextStream(tokenizer, [" t"], prompt_ids=prompt)
    assert stream.push([the]) == ("", 1, True)


EMOJI = (["<0xF0>", "<0x9F>", "<0x8E>", "<0x89>"], ["ð", "Ł", "İ", "ī"])  # 🎉 by its bytes


def test_a_character_that_the_prompt_began_comes_whole():
    for tokenizer, names in (
        (llama_style(), ["<0xE2>", "<0x82>", "<0xAC>"]),
        (byte_level(), ["â", "Ĥ", "¬"]),
    ):
        *begun, last = (tokenizer.backend.token_to_id(name) for name in names)
        x = tokenizer.encode("e", add_special_tokens=False)
        assert grown(tokenizer, [*x, *begun], [last, *x], [1], True).startswith("€")
        emoji = [tokenizer.backend.token_to_id(n) for n in EMOJI[tokenizer.decoder_kinds == ("ByteLevel",)]]
        for cut in range(1, 4):
            assert grown(tokenizer, [*x, *emoji[:cut]], [*emoji[cut:], *x], [1], True).startswith("🎉")
            places = TokenPlaces(tokenizer, True, [*x, *emoji[:cut]]).of([*emoji[cut:], *x])
            assert places[: 5 - cut] == [0] * (4 - cut) + [1]
        # Bytes that were characters in the prompt already stay so, whatever the output's are.
        assert grown(tokenizer, [*x, *begun, last], [begun[0]], [1], True) == "\ufffd"


def test_a_prompt_costs_no_more_than_its_last_tokens(monkeypatch):
    tokenizer = llama_style()
    lengths = lengths_decoded(monkeypatch)
    euro = [tokenizer.backend.token_to_id(f"<0x{byte:02X}>") for byte in "€".encode()]
    for prompt in (
        [*tokenizer.encode("lazy dog ") * 500],
        euro * 500,
        [*euro * 500, euro[0]],
        [euro[0]] * 500,
        [tokenizer.bos_id] * 500,
    ):
        text = IncrementalText(tokenizer, prompt_ids=prompt)
        text.push(tokenizer.encode("fox"))
        text.flush()
    assert sum(lengths) < 100


# ---------------------------------------------------------------- where tokens are


@pytest.mark.parametrize("make", [byte_level, llama_style, metaspace, bundled], ids=lambda make: make.__name__)
@settings(max_examples=80, deadline=None)
@given(text=st.text("aeblox qz.é日本€👩\n", max_size=20), cut=st.integers(0, 30))
def test_places_are_where_the_encoder_took_its_tokens_from(make, text, cut):
    tokenizer = make()
    ids = tokenizer.encode(text, add_special_tokens=False)
    assume(tokenizer.decode(ids, skip_special_tokens=False) == text)
    places = tokenizer.places(text, add_special_tokens=False)
    assert TokenPlaces(tokenizer, False).of(ids) == places
    before, behind = ids[:cut], ids[cut:]
    start = tokenizer.decode(before, skip_special_tokens=False)
    if text.startswith(start):  # no character is cut
        assert TokenPlaces(tokenizer, False, before, len(start)).of(behind) == places[cut:]


@each_tokenizer
@settings(max_examples=100, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_places_of_any_ids_rise_within_the_text(make, data, skip):
    tokenizer = make()
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=20))
    places = TokenPlaces(tokenizer, skip, start=7).of(ids)
    assert places == sorted(places)
    whole = tokenizer.decode(ids, skip)
    for place, at in enumerate(places):
        assert 7 <= at <= 7 + len(whole)
        if not tokenizer.byte_by_id:  # what stands before a token does not depend on it
            assert tokenizer.decode(ids[:place], skip).startswith(whole[: at - 7])


def test_tokens_of_one_character_are_where_it_is():
    for tokenizer, names in (
        (byte_level(), ["a", "â", "Ĥ", "¬", "<|bos|>", "e", "â", "Ĥ", "e"]),
        (llama_style(), ["a", "<0xE2>", "<0x82>", "<0xAC>", "<s>", "e", "<0xE2>", "e", "e"]),
    ):
        ids = [tokenizer.backend.token_to_id(name) for name in names]
        assert tokenizer.decode(ids).startswith("a€e\ufffde")
        expected = [0, 1, 1, 1, 2, 2, 3, 3, 4] if "<|bos|>" in names else [0, 1, 1, 1, 2, 2, 3, 4, 5]
        assert TokenPlaces(tokenizer).of(ids) == expected


def test_a_character_that_the_prompt_left_broken_takes_no_place_in_the_output():
    tokenizer = byte_level()
    e, first, second = (tokenizer.backend.token_to_id(name) for name in ("e", "â", "Ĥ"))
    for output, places in (([e, e], [0, 1]), ([second, e, e], [0, 0, 1]), ([first, e], [0, 1])):
        text = IncrementalText(tokenizer, prompt_ids=[e, first])
        assert (text.push(output) + text.flush()).replace("\ufffd", "") == "e" * output.count(e)
        assert TokenPlaces(tokenizer, prompt_ids=[e, first]).of(output) == places, output


def test_each_byte_of_a_broken_run_is_where_it_shows():
    tokenizer = llama_style()
    ids = [tokenizer.backend.token_to_id(name) for name in ("e", "<0xE2>", "<0xE2>", "<0xAC>", "e")]
    assert tokenizer.decode(ids) == "e\ufffd\ufffd\ufffde"
    assert TokenPlaces(tokenizer).of(ids) == [0, 1, 2, 3, 4]


def test_what_is_added_around_a_prompt_has_no_room_in_it():
    tokenizer = Tokenizer(byte_level().backend.from_str(byte_level().backend.to_str()), {}, ())
    from tokenizers import processors

    bos = tokenizer.encode("<|bos|>")[0]
    tokenizer.backend.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A <|bos|>", special_tokens=[("<|bos|>", bos)]
    )
    text = "a <|bos|>€"
    places = dict(zip(tokenizer.places(text), [tokenizer.token(id_) for id_ in tokenizer.encode(text)], strict=True))
    assert places == {0: "a", 1: "Ġ", 2: "<|bos|>", 9: "¬", 10: "<|bos|>"}
    assert tokenizer.places(text).count(9) == 3
