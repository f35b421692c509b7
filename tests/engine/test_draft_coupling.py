"""How often a draft model is wrong: as often as two argmaxes under the same Gumbel noise differ.

For distributions p and q that is 1 - sum_i 1 / sum_j max(p_j / p_i, q_j / q_i), between TV(p, q) and 2 TV / (1 + TV)
(Daliri, Musco and Suresh 2024). Rejection sampling would have TV(p, q) itself, with other tokens than plain decoding.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
from support.engines.draft_models import drafted
from support.engines.sampling_room import Room, ids_of, submit

from twostroke.core.request import SamplingParams
from twostroke.engine.speculation.length import DraftLength
from twostroke.model.drafter import ModelDrafter
from twostroke.model.sampling.sampler import Draw, Sampler

SAMPLED = SamplingParams(max_tokens=40, temperature=0.9, ignore_eos=True)


def softmax(logits, temperature):
    weights = np.exp((logits - logits.max()) / temperature)
    return weights / weights.sum()


def rejected(p, q):
    """Probability that the argmaxes of p and q under one noise differ."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.maximum(p[None, :] / p[:, None], q[None, :] / q[:, None]).sum(1)
    found = 1.0 - float((1.0 / ratios).sum())
    distance = 0.5 * float(np.abs(p - q).sum())
    assert distance - 1e-6 <= found <= 2 * distance / (1 + distance) + 1e-6
    return found


@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0])
def test_two_draws_differ_as_often_as_the_coupling_says(spread):
    chance = np.random.default_rng(int(spread * 10))
    first = chance.normal(0, 1.5, 12).astype(np.float32)
    second = (first + chance.normal(0, spread, 12)).astype(np.float32)
    sampler, count = Sampler([]), 3000
    params = SamplingParams(max_tokens=count, temperature=0.8, seed=3)

    def drawn(logits):
        rows = np.repeat(logits[None], count, 0)
        return [one.token_id for one in sampler.sample(rows, [Draw(params, 0, place) for place in range(count)])]

    expected = rejected(softmax(first.astype(float), 0.8), softmax(second.astype(float), 0.8))
    differ = sum(one != two for one, two in zip(drawn(first), drawn(second), strict=True))
    assert abs(differ - count * expected) < 4 * math.sqrt(count * expected * (1 - expected))


def test_rejections_of_a_tiny_draft_model_are_as_many_as_its_distributions_say(
    write_tiny, make_runner, make_hand, monkeypatch
):
    """One guess at every position of many texts; the sum of the probabilities is the expected number of rejections."""
    monkeypatch.setattr(DraftLength, "at", lambda *_: 1)
    large, small = write_tiny({}), write_tiny({"layers": 1})
    options = {"dtype": "float32", "kv_dtype": "float32", "kernels": "torch"}
    drafter = ModelDrafter(make_runner(small, **options))
    room = Room(make_runner(large, **options), speculation=drafted(1, caches=False), drafter=drafter, caches=False)
    # A bias on few tokens makes both models draw from them, each in its own way.
    params = replace(SAMPLED, logit_bias=tuple((id_, 8.0) for id_ in range(40, 50)))
    work = [submit(f"x{n}", ids_of(8, n), replace(params, seed=n)) for n in range(12)]
    room.send(*work)
    judged = []
    while True:
        room.hear(room.core.tick(0.0))
        room.guess()
        plan = room.core.plan(0.0)
        if plan is None:
            break
        result = room.runner.run(plan)
        for step, told in zip(plan.sequences, result.tokens, strict=True):
            if step.draft_ids:
                judged.append((step.key.request_id, step.start, len(told) == 1))
        room.hear(room.core.apply(plan, result, 0.0))
    probabilities, bias = [], np.zeros(160)
    bias[40:50] = 8.0
    for command in work:
        name = command.key.request_id
        whole = [*command.prompt_ids, *room.tokens[name]]
        ours, theirs = (
            make_hand(directory, tokens=256).logits([(name, 0, whole)])[0].double().numpy() + bias
            for directory in (large, small)
        )
        for place in (start for key, start, _ in judged if key == name):
            probabilities.append(rejected(softmax(ours[place], 0.9), softmax(theirs[place], 0.9)))
    observed, expected = sum(wrong for *_, wrong in judged), sum(probabilities)
    assert len(judged) > 200
    assert 0.05 < expected / len(judged) < 0.95
    assert abs(observed - expected) < 4 * math.sqrt(sum(p * (1 - p) for p in probabilities))
