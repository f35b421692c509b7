"""What is equal in all fields is named equally, and nothing else is."""

from dataclasses import fields, replace

import hypothesis.strategies as st
import pytest
from hypothesis import given

from twostroke.kv.block import IdentityRoot, chain
from twostroke.kv.keys import PromptHasher, digest_key, identity_key

ROOT = IdentityRoot("acme", b"weights", b"numerics", b"adapter", b"extra")
KEY = b"k" * 32
IDS = list(range(48))
OTHER = {str: "acme2", bytes: b"other"}


@pytest.mark.parametrize("field", [field.name for field in fields(IdentityRoot)])
def test_roots_that_differ_in_one_field_share_no_identity(field):
    for value in (OTHER[type(getattr(ROOT, field))], type(getattr(ROOT, field))()):
        other = replace(ROOT, **{field: value})
        mine, theirs = chain(KEY, ROOT.digest(KEY), IDS), chain(KEY, other.digest(KEY), IDS)
        assert not set(mine) & set(theirs)


def test_another_key_names_everything_otherwise():
    assert not set(chain(KEY, ROOT.digest(KEY), IDS)) & set(chain(b"x" * 32, ROOT.digest(b"x" * 32), IDS))
    assert ROOT.digest(KEY) != ROOT.digest(b"x" * 32)
    assert identity_key("one secret") != identity_key("another")
    assert digest_key("one secret") != digest_key("another")
    assert all(2**56 <= digest_key(secret) < 2**64 for secret in ("one secret", "another"))


@given(st.lists(st.binary(max_size=3), min_size=5, max_size=5), st.lists(st.binary(max_size=3), min_size=5, max_size=5))
def test_no_two_roots_are_written_alike(one, other):
    """What moves from the end of a field to the beginning of the next is another root."""
    roots = [IdentityRoot(parts[0].hex(), *parts[1:]) for parts in (one, other)]
    assert (roots[0].digest(KEY) == roots[1].digest(KEY)) == (one == other)


@pytest.mark.parametrize("place", [0, 15, 16, 47])
def test_a_token_changes_the_names_of_its_block_and_all_behind_it(place):
    other = [*IDS[:place], 999, *IDS[place + 1 :]]
    mine, theirs = chain(KEY, ROOT.digest(KEY), IDS), chain(KEY, ROOT.digest(KEY), other)
    assert [a == b for a, b in zip(mine, theirs, strict=True)] == [number < place // 16 for number in range(3)]


def test_a_tail_that_fills_no_block_has_no_name():
    names = [chain(KEY, ROOT.digest(KEY), IDS[:length]) for length in (15, 16, 31, 32, 47)]
    assert [len(name) for name in names] == [0, 1, 1, 2, 2]
    assert names[4] == names[3]


@pytest.mark.parametrize("field", [field.name for field in fields(PromptHasher)])
def test_namers_that_differ_in_one_field_agree_on_nothing(field):
    namer = PromptHasher(KEY, b"weights", b"numerics")
    other = replace(namer, **{field: b"other" * 4})
    mine, theirs = namer.name(IDS, "acme", b"adapter"), other.name(IDS, "acme", b"adapter")
    assert mine.root != theirs.root
    assert not set(mine.identities) & set(theirs.identities)
    assert namer.name(IDS, "acme", b"") != mine != namer.name(IDS, "umbrella", b"adapter")
