"""The fewest tokens of a text: never more than it has."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from twostroke.text.token_bounds import BYTE_LEVEL, TokenBounds


@pytest.fixture(scope="module")
def backend() -> Tokenizer:
    """Of bytes, whose longest token has three of them."""
    vocab = {token: place for place, token in enumerate([*sorted(BYTE_LEVEL), "ab", "abc"])}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b"), ("ab", "c")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return made


@pytest.mark.parametrize("text", ["", "abc", "abcab", "abcabc", "abcabca", "abc" * 100])
def test_a_text_of_the_longest_tokens_has_as_many_as_its_bound(backend: Tokenizer, text: str):
    assert TokenBounds(backend).least(text) == len(backend.encode(text).ids)
