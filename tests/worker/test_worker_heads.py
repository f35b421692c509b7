"""A worker with heads says what a plain one says, alone and after a hand-over."""

import pytest
from support.checkpoints.heads import worker_with_heads, write_medusa
from support.engines.workers import VOCAB

from twostroke.core.errors import ConfigError
from twostroke.core.request import Role
from twostroke.engine.config import SpeculationConfig
from twostroke.engine.speculation.pace import DraftPace

SAMPLED = {"max_tokens": 30, "temperature": 0.9, "seed": 5, "ignore_eos": True, "logprobs": 2}


@pytest.fixture(autouse=True)
def _guesses_always(monkeypatch):
    """Whether guessing pays here, measured step times say: a test must not depend on them."""
    monkeypatch.setattr(DraftPace, "begins", lambda *_: True)
    monkeypatch.setattr(DraftPace, "is_on", lambda *_: True)


@pytest.fixture(params=["medusa", "eagle3"])
def heads(tiny_checkpoint, tmp_path, request):
    """Settings of a worker with heads."""
    return worker_with_heads(request.param, tiny_checkpoint, tmp_path)


async def test_heads_change_nothing_alone_and_handed_over(start_worker, router_of, make_prompt, all_free, heads):
    plain = await start_worker(Role.COMBINED, model_directory=heads["model_directory"])
    guesses = await start_worker(Role.COMBINED, **heads)
    prefill = await start_worker(Role.PREFILL, **heads)
    decode = await start_worker(Role.DECODE, **heads)
    method = heads["speculation"].method
    hands = [await router_of(worker) for worker in (plain, guesses, decode)]
    for place, length in enumerate((5, 50)):
        name, ids = f"r{place}", make_prompt(length, place)
        answers = [
            await hands[0].submit(name, ids, sampling=SAMPLED),
            await hands[1].submit(name, ids, sampling=SAMPLED),
            await hands[2].submit(name, ids, [prefill], sampling=SAMPLED),
        ]
        ends = [(await answer.ended()).end for answer in answers]
        assert answers[1].token_ids == answers[2].token_ids == answers[0].token_ids
        assert [end.usage.proposer for end in ends] == ["", method, method]
        assert all(end.usage.draft_tokens > 0 for end in ends[1:])
    await all_free(guesses, prefill, decode)


async def test_heads_of_another_model_are_refused_before_anything_is_loaded(start_worker, tmp_path):
    heads = SpeculationConfig(method="medusa", model=str(write_medusa(tmp_path, vocab=VOCAB + 1)))
    with pytest.raises(ConfigError, match=r"give 261 tokens; .* has 64 and 260"):
        await start_worker(Role.COMBINED, speculation=heads)
