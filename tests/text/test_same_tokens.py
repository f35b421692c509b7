"""A draft model's tokenizer has the tokens of the served model's, or is refused with what differs."""

import pytest
import tokenizers
from tokenizers import AddedToken
from tokenizers.models import WordLevel

from twostroke.core.errors import ConfigError
from twostroke.text.same_tokens import check_same_tokens
from twostroke.text.tokenizer import Tokenizer

WORDS = ("<s>", "</s>", "<|im_end|>", "a", "b", "c")


def tokenizer(words=WORDS, special=("<s>", "</s>", "<|im_end|>"), bos="<s>", eos="</s>", ends=()):
    backend = tokenizers.Tokenizer(WordLevel({word: id_ for id_, word in enumerate(words)}, unk_token="a"))
    backend.add_special_tokens([AddedToken(word, special=True) for word in special])
    return Tokenizer(backend, {"bos_token": bos, "eos_token": eos}, ends)


def refused(draft):
    with pytest.raises(ConfigError) as caught:
        check_same_tokens(tokenizer(), draft, "speculation.model is /there")
    assert "same tokenizer" in str(caught.value)
    return str(caught.value)


def test_the_same_tokens_pass_in_any_file_and_with_more_ends():
    check_same_tokens(tokenizer(), tokenizer(), "speculation.model is /there")
    check_same_tokens(tokenizer(), tokenizer(ends=(2,)), "speculation.model is /there")
    check_same_tokens(tokenizer(eos="<|im_end|>", ends=(1,)), tokenizer(), "speculation.model is /there")


def test_other_vocabularies_are_refused_with_the_first_ids_that_differ():
    told = refused(tokenizer((*WORDS[:3], "a", "c", "b")))
    assert "speculation.model is /there" in told
    assert "id 4 is 'c', the model's 'b'; id 5 is 'b', the model's 'c'" in told
    told = refused(tokenizer((*WORDS, "d")))
    assert "it has 7 tokens, the model's 6; id 6 is 'd', the model's missing" in told
    told = refused(tokenizer((*WORDS[:3], *"vwxyz")))
    assert "and 2 other ids" in told


def test_other_special_ids_are_refused_by_name():
    assert "special ids of the model alone: 2 ('<|im_end|>')" in refused(tokenizer(special=("<s>", "</s>")))
    told = refused(tokenizer(special=("<s>", "</s>", "<|im_end|>", "c")))
    assert "special ids of the draft model alone: 5 ('c')" in told


def test_other_begins_and_ends_are_refused():
    assert "texts begin with id 0, the draft model's with 1" in refused(tokenizer(bos="</s>"))
    assert "texts end with ids 1, the draft model's with 2" in refused(tokenizer(eos="<|im_end|>"))
