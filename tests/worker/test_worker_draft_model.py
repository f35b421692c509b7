"""A worker with a draft model says what a plain one says, alone and after a hand-over."""

import json
import shutil

import pytest

from twostroke.core.errors import ConfigError
from twostroke.core.request import Role
from twostroke.engine.config import SpeculationConfig
from twostroke.engine.speculation.pace import DraftPace

KINDS = {
    "greedy": {"max_tokens": 30, "temperature": 0.0, "ignore_eos": True},
    "sampled": {"max_tokens": 30, "temperature": 0.9, "seed": 5, "ignore_eos": True, "logprobs": 2},
    "stop": {
        "max_tokens": 30,
        "temperature": 0.7,
        "seed": 5,
        "logit_bias": {65: 9.0, 66: 9.0},
        "stop": ["ABBA"],
    },
}


@pytest.fixture(autouse=True)
def _guesses_always(monkeypatch):
    """Whether guessing pays here, measured step times say: a test must not depend on them."""
    monkeypatch.setattr(DraftPace, "begins", lambda *_: True)
    monkeypatch.setattr(DraftPace, "is_on", lambda *_: True)


def drafted(directory):
    return SpeculationConfig(model=str(directory), num_speculative_tokens=4)


async def test_a_draft_model_changes_nothing_alone_and_handed_over(
    start_worker, router_of, make_prompt, all_free, tiny_checkpoint
):
    itself = drafted(tiny_checkpoint)
    plain = await start_worker(Role.COMBINED)
    guesses = await start_worker(Role.COMBINED, speculation=itself)
    prefill = await start_worker(Role.PREFILL, speculation=itself)
    decode = await start_worker(Role.DECODE, speculation=itself)
    hands = [await router_of(worker) for worker in (plain, guesses, decode)]
    for place, (kind, length) in enumerate((("greedy", 5), ("greedy", 90), ("sampled", 40), ("stop", 33))):
        name, ids, options = f"r{place}", make_prompt(length, place), {"sampling": KINDS[kind]}
        answers = [
            await hands[0].submit(name, ids, **options),
            await hands[1].submit(name, ids, **options),
            await hands[2].submit(name, ids, [prefill], **options),
        ]
        ends = [(await answer.ended()).end for answer in answers]
        assert answers[1].token_ids == answers[2].token_ids == answers[0].token_ids
        assert answers[1].text == answers[2].text == answers[0].text
        assert len({end.reason for end in ends}) == 1
        assert [end.usage.proposer for end in ends] == ["", "draft_model", "draft_model"]
        for end in ends[1:]:  # the target as its own draft model is always right, but a stop string may cut its guesses
            assert end.usage.draft_tokens - end.usage.accepted_tokens <= (4 if kind == "stop" else 0)
            assert end.usage.accepted_tokens > 0
    await all_free(guesses, prefill, decode)
    for worker in (guesses, decode):
        assert dict(worker.dispatcher.last_load.counters)["draft_blocks"] > 0


async def test_another_tokenizer_is_refused_before_anything_is_loaded(start_worker, tiny_checkpoint, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny_checkpoint, other)
    told = json.loads((other / "tokenizer.json").read_text())
    first, second = list(told["model"]["vocab"])[40:42]
    vocabulary = told["model"]["vocab"]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(told))
    with pytest.raises(ConfigError, match=r"speculation.model is .*tokenizer differs.* id 4"):
        await start_worker(Role.COMBINED, speculation=drafted(other))
