import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from twostroke.core.errors import InternalError
from twostroke.core.request import FinishReason, SamplingParams, TokenLogprobs
from twostroke.decode_worker.choice import ChoiceText
from twostroke.text.tokenizer import Tokenizer

EOS = 256


def make_tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["</s>"])
    return Tokenizer(backend, {}, [EOS])


TOKENIZER = make_tokenizer()


def ids(text):
    return TOKENIZER.encode(text)


def choice(emitted=(), **params):
    return ChoiceText(TOKENIZER, SamplingParams(**{"max_tokens": 100} | params), {EOS}, emitted)


WORDS = {"<unk>": 0, "</s>": 1, "▁a": 2, "▁b": 3, "c": 4}


def spaced(emitted=(), prompt=(2,), **params):
    """Of a vocabulary whose words hold the space before them, behind a prompt."""
    backend = tokenizers.Tokenizer(models.WordLevel(WORDS, unk_token="<unk>"))
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["<unk>", "</s>"])
    params = SamplingParams(**{"max_tokens": 9} | params)
    return ChoiceText(Tokenizer(backend, {}, [1]), params, {1}, emitted, prompt_ids=prompt)


def test_the_first_word_keeps_its_space_also_after_a_fall_back():
    assert spaced().push(0, [2, 3]).text == " a b"
    assert spaced(prompt=()).push(0, [2, 3]).text == "a b"
    assert spaced(emitted=[3]).push(1, [2]).text == " a"
    it = spaced(stop=(" b",))
    assert (it.push(0, [3]).text, it.ended) == ("", FinishReason.STOP)


def test_special_tokens_show_where_they_are_asked_for():
    assert spaced(ignore_eos=True).push(0, [2, 1, 3]).text == " a b"
    assert spaced(ignore_eos=True, skip_special_tokens=False).push(0, [2, 1, 3]).text == " a</s> b"
    assert spaced(skip_special_tokens=False).push(0, [2, 1]).text == " a"  # what ends it is no part of it
    assert spaced(skip_special_tokens=False, include_stop=True).push(0, [2, 1]).text == " a</s>"


@pytest.mark.parametrize(("included", "text"), [(False, " a"), (True, " a</s>")])
def test_a_stop_string_can_name_a_special_token(included, text):
    for ignored in (False, True):  # it ends the choice anyway, or by its name alone
        it = spaced(stop=("</s>",), include_stop=included, ignore_eos=ignored)
        spoken = it.push(0, [2, 1, 3])
        assert (spoken.text + it.flush(), spoken.token_ids, spoken.ended) == (text, (2, 1), FinishReason.STOP)
    it = spaced(stop=("a</s>",))  # cut, though the end token alone would have left it
    assert it.push(0, [2, 1]).text + it.flush() == " "


def test_tokens_that_are_known_already_do_not_count_again():
    it = choice()
    it.push(0, ids("ab"))
    spoken = it.push(0, ids("abc"))
    assert (spoken.first_index, spoken.token_ids, spoken.text) == (2, tuple(ids("c")), "c")
    assert it.push(1, ids("bc")).token_ids == ()


def test_missing_tokens_are_an_error_never_a_silent_gap():
    it = choice()
    it.push(0, ids("ab"))
    with pytest.raises(InternalError, match="token 3 came where 2 was next"):
        it.push(3, ids("d"))


def test_the_end_token_counts_and_has_no_text():
    spoken = choice().push(0, [*ids("ab"), EOS, *ids("c")])
    assert spoken.token_ids == (*ids("ab"), EOS)
    assert (spoken.text, spoken.ended, spoken.is_by_text) == ("ab", FinishReason.STOP, False)


def test_a_stop_string_over_two_pushes_cuts_the_text():
    it = choice(stop=("xyz",))
    first, second = it.push(0, ids("abxy")), it.push(4, ids("zcd"))
    assert first.text + second.text == "ab"
    assert second.token_ids == tuple(ids("z"))
    assert (second.ended, second.is_by_text) == (FinishReason.STOP, True)
    assert it.flush() == ""
    assert it.push(5, ids("e")).token_ids == ()


def test_what_was_withheld_comes_with_the_end():
    it = choice(stop=("xyz",), max_tokens=4)
    spoken = it.push(0, ids("abxy"))
    assert (spoken.text, spoken.ended) == ("ab", FinishReason.LENGTH)
    assert it.flush() == "xy"


def test_an_unfinished_character_may_complete_nothing_but_is_not_lost():
    it = choice(max_tokens=2)
    assert it.push(0, ids("aé")[:2]).text == "a"
    assert it.flush() == "�"


def test_a_stop_string_that_the_last_text_completes_is_the_reason():
    it = choice(max_tokens=2, stop=("\ufffd",))
    assert it.push(0, ids("aé")[:2]).ended is FinishReason.LENGTH
    assert it.flush() == ""
    assert it.ended is FinishReason.STOP


def test_length_counts_what_earlier_dispatches_gave():
    spoken = choice(emitted=ids("abc"), max_tokens=5).push(3, ids("defg"))
    assert (spoken.first_index, spoken.token_ids, spoken.ended) == (3, tuple(ids("de")), FinishReason.LENGTH)


@given(st.text(max_size=12), st.integers(0, 30), st.sampled_from([(), ("b",), ("ab", "a"), ("é",)]), st.data())
def test_any_cut_into_dispatches_and_pushes_gives_the_same_text(text, cut, stop, data):
    all_ids = ids(text)
    whole = choice(stop=stop)
    expected = whole.push(0, all_ids)
    expected_text = expected.text + whole.flush()
    cut = min(cut, len(expected.token_ids))
    before = choice(stop=stop)
    given_text = before.push(0, all_ids[:cut]).text
    after = choice(emitted=all_ids[:cut], stop=stop)
    place, rest = cut, ""
    while place < len(all_ids):
        size = data.draw(st.integers(1, 4))
        rest += after.push(place, all_ids[place : place + size]).text
        place += size
    assert given_text + rest + after.flush() == expected_text
    assert after.num_tokens == whole.num_tokens


def scored(text, *more):
    return [TokenLogprobs(i, -float(n), 1, ()) for n, i in enumerate([*ids(text), *more])]


def test_logprobs_go_with_the_tokens_that_count():
    it = choice(stop=("xy",))
    first = it.push(0, ids("ab"), scored("ab"))
    assert [one.token_id for one in first.logprobs] == ids("ab")
    again = it.push(1, ids("bxyz"), scored("bxyz"))
    assert [one.token_id for one in again.logprobs] == ids("xy") == list(again.token_ids)
    assert it.num_shown == 2


def test_the_end_token_is_not_shown_unless_its_text_is():
    plain, included = choice(stop_token_ids=(98,)), choice(stop_token_ids=(98,), include_stop=True)
    for it, text in ((plain, "a"), (included, "a" + TOKENIZER.decode([98]))):
        spoken = it.push(0, [*ids("a"), 98])
        assert (spoken.text + it.flush(), spoken.ended) == (text, FinishReason.STOP)
        assert it.num_shown == len(text)


def test_a_stop_string_waits_for_min_tokens_also_after_a_fall_back():
    whole = choice(stop=("b",), min_tokens=3)
    assert whole.push(0, ids("abcab")).text == "abca"
    again = choice(ids("ab"), stop=("b",), min_tokens=3)
    assert (again.push(2, ids("cab")).text, again.ended) == ("ca", FinishReason.STOP)
