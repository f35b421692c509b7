"""What is equal in all fields is named equally, and nothing else is."""

from dataclasses import fields, replace

import hypothesis.strategies as st
import pytest
from hypothesis import given

from twostroke.core.request import CacheScope, Request, SamplingParams
from twostroke.engine.facts import ModelFacts
from twostroke.kv.block import IdentityRoot, chain
from twostroke.kv.codec import Codec
from twostroke.kv.keys import PromptHasher, digest_key, identity_key
from twostroke.kv.messages import scope_from_wire, scope_to_wire
from twostroke.kv.spec import attention_spec
from twostroke.protos import handover_pb2, worker_pb2

SCOPE = CacheScope("acme", b"adapter")
ROOT = IdentityRoot(SCOPE, b"weights", b"numerics")
KEY = b"k" * 32
IDS = list(range(48))
OTHER = {str: "acme2", bytes: b"other"}


SCOPE_FIELDS = [field.name for field in fields(CacheScope)]


def other_scopes(field):
    """Scopes that differ from `SCOPE` in one field: by another value, and by an empty one."""
    kind = type(getattr(SCOPE, field))
    return [replace(SCOPE, **{field: value}) for value in (OTHER[kind], kind())]


def other_roots():
    for field in SCOPE_FIELDS:
        yield from (replace(ROOT, scope=scope) for scope in other_scopes(field))
    for field in {field.name for field in fields(IdentityRoot)} - {"scope"}:
        yield from (replace(ROOT, **{field: value}) for value in (b"other", b""))


def test_roots_that_differ_in_one_field_share_no_identity():
    mine = chain(KEY, ROOT.digest(KEY), IDS)
    others = list(other_roots())
    assert len(others) == 2 * (len(SCOPE_FIELDS) + 2)
    for other in others:
        assert not set(mine) & set(chain(KEY, other.digest(KEY), IDS)), other


@pytest.mark.parametrize("field", SCOPE_FIELDS)
def test_a_scope_is_the_same_in_a_request_and_in_every_message(field):
    for scope in other_scopes(field):
        for message in (worker_pb2.Submit, handover_pb2.Open, handover_pb2.FetchRequest):
            parsed = message.FromString(message(**scope_to_wire(scope)).SerializeToString())
            assert scope_from_wire(parsed) == scope
        values = {name: getattr(scope, name) for name in SCOPE_FIELDS}
        assert Request("r", "m", (1,), SamplingParams(1), 1, timeout_s=1.0, **values).cache_scope == scope


def test_another_key_names_everything_otherwise():
    assert not set(chain(KEY, ROOT.digest(KEY), IDS)) & set(chain(b"x" * 32, ROOT.digest(b"x" * 32), IDS))
    assert ROOT.digest(KEY) != ROOT.digest(b"x" * 32)
    assert identity_key("one secret") != identity_key("another")
    assert digest_key("one secret") != digest_key("another")
    assert all(2**56 <= digest_key(secret) < 2**64 for secret in ("one secret", "another"))


@given(st.lists(st.binary(max_size=3), min_size=4, max_size=4), st.lists(st.binary(max_size=3), min_size=4, max_size=4))
def test_no_two_roots_are_written_alike(one, other):
    """What moves from the end of a field to the beginning of the next is another root."""
    roots = [IdentityRoot(CacheScope(parts[0].hex(), parts[1]), *parts[2:]) for parts in (one, other)]
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
def test_hashers_that_differ_in_one_field_agree_on_nothing(field):
    hasher = PromptHasher(KEY, b"weights", b"numerics")
    other = replace(hasher, **{field: b"other" * 4})
    mine, theirs = hasher.name(IDS, SCOPE), other.name(IDS, SCOPE)
    assert mine.root != theirs.root
    assert not set(mine.identities) & set(theirs.identities)


@pytest.mark.parametrize("field", SCOPE_FIELDS)
def test_a_hasher_names_scopes_that_differ_in_one_field_otherwise(field):
    hasher = PromptHasher(KEY, b"weights", b"numerics")
    for scope in other_scopes(field):
        assert hasher.root(scope) == hasher.name(IDS, scope).root != hasher.root(SCOPE)
        assert not set(hasher.name(IDS, scope).identities) & set(hasher.name(IDS, SCOPE).identities)


def test_the_numerics_class_is_in_the_names_of_a_deterministic_model_only():
    spec = attention_spec(2, 2, 16, Codec.FP8_E4M3)
    model = ModelFacts("m", "", 100, 64, frozenset({1}), b"weights", b"numerics", "here", True, spec)
    assert PromptHasher.of(KEY, model) == PromptHasher(KEY, b"weights", b"numerics")
    assert PromptHasher.of(KEY, replace(model, deterministic=False)) == PromptHasher(KEY, b"weights", b"")
