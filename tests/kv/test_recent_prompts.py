"""A prompt is hashed once per request, and never named by what is known of another one."""

from dataclasses import replace

import pytest

from twostroke.core.request import CacheScope
from twostroke.kv.keys import PromptHasher
from twostroke.kv.recent_prompts import RecentPrompts

HASHER = PromptHasher(b"k" * 32, b"w" * 16, b"c" * 16)
SCOPE = CacheScope("acme", b"")
IDS = tuple(range(1000, 1100))


def copy_of(ids):
    return tuple(token + 0 for token in ids)


def test_an_equal_prompt_of_the_same_request_is_the_same_value():
    prompts = RecentPrompts(HASHER)
    first = prompts.name("r", IDS, SCOPE)
    again = prompts.name("r", copy_of(IDS), SCOPE)
    assert again is first
    assert again.prompt_ids is IDS
    assert again.names == HASHER.name(IDS, SCOPE)


@pytest.mark.parametrize(
    ("ids", "scope"),
    [
        ((*IDS[:-1], 7), SCOPE),
        (IDS[:-1], SCOPE),
        ((*IDS, 7), SCOPE),
        (IDS, replace(SCOPE, isolation_domain="umbrella")),
        (IDS, replace(SCOPE, adapter=b"a")),
    ],
)
def test_another_prompt_or_scope_of_that_request_is_named_anew(ids, scope):
    prompts = RecentPrompts(HASHER)
    prompts.name("r", IDS, SCOPE)
    for _ in range(2):
        assert prompts.name("r", ids, scope) == (ids, HASHER.name(ids, scope))
    assert prompts.name("r", IDS, SCOPE) == (IDS, HASHER.name(IDS, SCOPE))


def test_the_least_recent_are_forgotten_and_the_newest_is_kept_however_long():
    prompts = RecentPrompts(HASHER, max_tokens=250)
    one, two = prompts.name("1", IDS, SCOPE), prompts.name("2", IDS, SCOPE)
    assert prompts.name("1", copy_of(IDS), SCOPE) is one
    prompts.name("3", IDS, SCOPE)
    assert prompts.name("1", copy_of(IDS), SCOPE) is one
    assert prompts.name("2", copy_of(IDS), SCOPE) is not two
    long_ids = tuple(range(300))
    long = prompts.name("4", long_ids, SCOPE)
    assert prompts.name("4", copy_of(long_ids), SCOPE) is long
    assert prompts.name("1", copy_of(IDS), SCOPE) is not one


def test_a_prompt_that_takes_anothers_place_is_counted_once():
    prompts = RecentPrompts(HASHER, max_tokens=250)
    for place in range(10):
        prompts.name("r", (*IDS[:-1], place), SCOPE)
    kept = prompts.name("other", IDS, SCOPE)
    prompts.name("r", (*IDS[:-1], 9), SCOPE)
    assert prompts.name("other", copy_of(IDS), SCOPE) is kept
