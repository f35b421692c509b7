"""What a call becomes before anybody computes it: whose it is, how long it may take, and which tokens it may hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from twostroke.core.errors import ContextLengthExceeded, InvalidRequest, Unauthenticated
from twostroke.core.request import Request
from twostroke.router.api.call import GenerateCall
from twostroke.router.api.models import ServedModel
from twostroke.router.api.text_work import LARGE_CHARS
from twostroke.router.api.validate import Limits, num_chars_of, validate
from twostroke.router.keys.grants import KeyRing
from twostroke.text.tokenizer import Tokenizer

VOCAB, CONTEXT = 4096, 100
HELLO = [{"role": "user", "content": "hello"}]
KEYS = ("a-secret-of-ann", "a-secret-of-bob")
TOKENIZER = Tokenizer.load(Path(__file__).resolve().parents[3] / "model" / "bundled")


def checked(prompt: Any = (5, 6), *, vocab: int = VOCAB, keys: tuple[str, ...] = KEYS, **fields: Any) -> Request:
    model = ServedModel("m", CONTEXT, vocab, TOKENIZER, None, None)  # type: ignore[arg-type]
    return validate(GenerateCall(prompt=prompt, **fields), model, Limits(8, None, 60.0, KeyRing.of(keys)))


def test_a_tenant_and_its_salts_have_domains_of_their_own() -> None:
    asked = [(key, salt) for key in KEYS for salt in (None, "s", "other")]
    found = [checked(api_key=key, cache_salt=salt) for key, salt in asked]
    assert len({request.isolation_domain for request in found}) == len(asked)
    assert len({request.owner for request in found}) == len(KEYS)
    assert checked(api_key=KEYS[0], cache_salt="s").isolation_domain == found[1].isolation_domain
    with pytest.raises(Unauthenticated):
        checked(api_key="a-secret-of-eve")


def test_a_client_may_shorten_the_timeout_and_not_lengthen_it() -> None:
    assert [checked(keys=(), timeout_s=given).timeout_s for given in (None, 5.0, 500.0)] == [60.0, 5.0, 60.0]


def test_a_prompt_leaves_room_for_a_token() -> None:
    assert len(checked([7] * (CONTEXT - 1), keys=()).prompt_ids) == CONTEXT - 1
    for length in (CONTEXT, CONTEXT + 1):
        with pytest.raises(ContextLengthExceeded, match=str(length)):
            checked([7] * length, keys=())


@pytest.mark.parametrize("token", [True, -1, VOCAB, 1.0, "5", None])
def test_a_prompt_of_ids_holds_ids_of_the_model(token: Any) -> None:
    assert checked([VOCAB - 1], keys=()).prompt_ids == (VOCAB - 1,)
    with pytest.raises(InvalidRequest, match=r"prompt\[1\]"):
        checked([5, token], keys=())


def test_a_text_whose_tokens_the_model_has_not_is_refused() -> None:
    ids = checked("Hello there", keys=()).prompt_ids
    assert checked("Hello there", keys=(), vocab=max(ids) + 1).prompt_ids == ids
    with pytest.raises(InvalidRequest, match="leave it out"):
        checked("Hello there", keys=(), vocab=max(ids))


@pytest.mark.parametrize(
    "large",
    [
        {"messages": [{"role": "user", "content": "x" * 70_000}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}] * 5_000}]},
        {
            "messages": HELLO,
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"x" * 70_000: 1}}}],
        },
        {"messages": HELLO, "tools": [{"function": {"parameters": {"enum": list(range(40_000))}}}]},
        {"messages": HELLO, "documents": [{"text": "x" * 70_000}]},
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": "x" * 70_000}}]}]},
    ],
)
def test_a_large_text_is_known_wherever_it_stands(large):
    assert num_chars_of(GenerateCall(**large)) > LARGE_CHARS
    assert 0 < num_chars_of(GenerateCall(messages=HELLO, tools=[{"function": {"name": "f"}}])) < 200
