"""The quick sampler against the plain definition, bit for bit, and both against the distributions they stand for."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest

from twostroke.core.request import SamplingParams
from twostroke.engine.plan import History
from twostroke.model.sampling import noise
from twostroke.model.sampling.filters import RoughTopP, apply_filters, before_top_p, exact_top_p
from twostroke.model.sampling.noise import gumbel, winner
from twostroke.model.sampling.sampler import Draw, Sampler

PARAMS = SamplingParams(max_tokens=8)


def plain_kept(row: np.ndarray, params: SamplingParams) -> np.ndarray:
    """min_p, top_k, top_p by whole sorts: which ids may be drawn, rising."""
    order = np.lexsort((np.arange(len(row)), -row.astype(np.float64)))  # value falling, then id rising
    best, temperature = float(row.max()), params.temperature
    if params.min_p > 0:
        order = order[row[order].astype(np.float64) >= best + temperature * math.log(params.min_p)]
    if params.top_k:
        order = order[: params.top_k]
    if params.top_p < 1:
        scores = (row[order] - row.max()) / np.float32(temperature)
        weights = [int(w) for w in (np.exp(scores) * np.float32(2.0**40)).astype(np.int64)]
        limit, before, count = math.ceil(params.top_p * sum(weights)), 0, 0
        for weight in sorted(weights, reverse=True):
            if before >= limit:
                break
            before, count = before + weight, count + 1
        order = order[:count]
    return np.sort(order)


def plain_token(row: np.ndarray, params: SamplingParams, choice: int, position: int) -> int:
    """Every candidate's logit over temperature plus its noise; the largest, of equals the lowest id."""
    ids = plain_kept(row, params)
    scores = (row[ids].astype(np.float64) - float(row.max())) / params.temperature
    return int(ids[(scores + gumbel(params.seed, choice, position, ids)).argmax()])


def random_row(chance: random.Random, vocab: int) -> np.ndarray:
    """Flat, peaked, tied, heavy-tailed or partly forbidden logits."""
    generator = np.random.default_rng(chance.getrandbits(32))
    kind = chance.choice(("normal", "normal", "flat", "tied", "peaked", "tail", "banned"))
    row = generator.normal(0, chance.choice((0.01, 1, 3, 10)), vocab)
    if kind == "flat":
        row[:] = chance.uniform(-5, 5)
    elif kind == "tied":
        row = np.round(row)
    elif kind == "peaked":
        row[chance.randrange(vocab)] += 30
    elif kind == "tail":
        row = -np.arange(vocab) * 0.01 + generator.normal(0, 0.001, vocab)
    row = row.astype(np.float32)
    if kind == "banned":
        row[generator.random(vocab) < 0.9] = -np.inf
        row[chance.randrange(vocab)] = 1.0
    return row


def random_params(chance: random.Random, vocab: int) -> SamplingParams:
    return replace(
        PARAMS,
        temperature=chance.choice((0.05, 0.7, 1.0, 1.0, 1.7, 20.0)),
        top_k=chance.choice((0, 0, 0, 1, 5, 50, vocab)),
        top_p=chance.choice((1.0, 1.0, 0.999, 0.95, 0.5, 0.01)),
        min_p=chance.choice((0.0, 0.0, 0.05, 0.5, 1.0)),
        seed=chance.getrandbits(64),
    )


@pytest.mark.parametrize(("vocab", "num_cases"), [(7, 4000), (300, 4000), (600, 1000), (5000, 800), (32_000, 200)])
def test_the_quick_way_takes_the_token_of_the_plain_definition(vocab: int, num_cases: int) -> None:
    chance = random.Random(vocab)
    sampler = Sampler(())
    for _ in range(num_cases // 8):
        rows = np.stack([random_row(chance, vocab) for _ in range(8)])
        rows[~np.isfinite(rows)] = -1e30
        draws = [Draw(random_params(chance, vocab), chance.randrange(3), chance.randrange(1000)) for _ in rows]
        got = [one.token_id for one in sampler.sample(rows, draws) if one]
        want = [plain_token(row, d.params, d.choice, d.position) for row, d in zip(rows, draws, strict=True)]
        assert got == want, next(d for d, a, b in zip(draws, got, want, strict=True) if a != b)


def test_filters_keep_what_the_plain_definition_keeps_also_where_tokens_are_forbidden() -> None:
    chance = random.Random(1)
    for number in range(600):
        vocab = (9, 400, 3000)[number % 3]
        row, params = random_row(chance, vocab), random_params(chance, vocab)
        kept = apply_filters(row, params)
        ids = np.arange(vocab) if kept.ids is None else kept.ids
        want = plain_kept(row, params)
        # Forbidden tokens may be among the kept where fewer than top_k are allowed; they never win.
        assert np.array_equal(ids[row[ids] > -np.inf], want[row[want] > -np.inf]), params


def test_a_rough_look_at_top_p_never_says_more_than_is_so() -> None:
    chance = random.Random(2)
    sure = 0
    for _ in range(500):
        row = random_row(chance, 2000)
        params = replace(random_params(chance, 2000), top_k=0, top_p=chance.choice((0.99, 0.9, 0.5)))
        candidates = before_top_p(row, params)
        rough = RoughTopP(candidates, params)
        near = set(range(2000) if rough.near.ids is None else rough.near.ids.tolist())
        exact = exact_top_p(candidates, params)
        kept = set(range(2000) if exact.ids is None else exact.ids.tolist())
        assert kept <= near
        for token_id in chance.sample(sorted(near), min(20, len(near))):
            if rough.keeps(token_id):
                sure += 1
                assert token_id in kept
    assert sure > 2000


def test_equal_totals_give_the_lowest_id_on_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "_noise", lambda bits: np.zeros(len(bits)))
    assert winner(np.array([0, 5, 5, 1], np.float32), None, 1.0, (1, 0, 0)) == 1
    row = np.zeros(4000, np.float32)
    row[[70, 900]] = 3.0
    assert winner(row, None, 1.0, (1, 0, 0)) == 70


# ---------------------------------------------------------------- distributions

LOGITS = np.array([0.3, -1.0, 2.0, 1.1, 0.0, -0.4, 1.9, 0.7, -2.5, 1.4], np.float32)
CRITICAL = {1: 10.8, 2: 13.8, 3: 16.3, 4: 18.5, 5: 20.5, 6: 22.5, 7: 24.3, 8: 26.1, 9: 27.9}  # 99.9 % points

FILTERS = [
    {"temperature": 0.5},
    {"temperature": 1.6},
    {"top_k": 4},
    {"top_p": 0.8},
    {"min_p": 0.2},
    {"temperature": 1.3, "min_p": 0.1, "top_k": 6, "top_p": 0.9},
    {"temperature": 0.7, "top_k": 5, "top_p": 0.95},
]


def noise_of_many(seed: int, positions: range, ids: np.ndarray) -> np.ndarray:
    """`gumbel` of many positions at once: [positions, ids]."""
    keys = np.array([noise._key(seed, 0, position) for position in positions], np.uint64)
    starts = keys[:, None] + (ids.astype(np.uint64) + np.uint64(1)) * np.uint64(noise._GOLDEN)
    many = noise._noise(noise._mixed(noise._half_mix(starts)))
    assert np.array_equal(many[7], gumbel(seed, 0, positions[7], ids))
    return many


def exact_distribution(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Softmax at the temperature; min_p, top_k, top_p one after the other, each time normalised. In plain float64."""
    probabilities = np.exp(logits.astype(np.float64) / params.temperature)
    probabilities /= probabilities.sum()
    if params.min_p:
        probabilities[probabilities < params.min_p * probabilities.max()] = 0
    if params.top_k:
        probabilities[np.argsort(-probabilities)[params.top_k :]] = 0
    probabilities /= probabilities.sum()
    if params.top_p < 1:
        order = np.argsort(-probabilities)
        before = np.cumsum(probabilities[order]) - probabilities[order]
        probabilities[order[before >= params.top_p]] = 0
    return probabilities / probabilities.sum()


@pytest.mark.parametrize("fields", FILTERS, ids=str)
def test_a_hundred_thousand_draws_follow_the_exact_distribution(fields: dict[str, float]) -> None:
    params = replace(PARAMS, **fields)  # type: ignore[arg-type]
    want = exact_distribution(LOGITS, params)
    kept = apply_filters(LOGITS, params)
    ids = np.arange(len(LOGITS)) if kept.ids is None else kept.ids
    scaled = kept.values.astype(np.float64) / params.temperature
    counts = np.zeros(len(LOGITS))
    for seed in range(10):  # a tenth through the sampler, the rest by its formula, so that 10^5 draws stay quick
        draws = [Draw(replace(params, seed=seed), 0, p) for p in range(1000)]
        tokens = [s.token_id for s in Sampler(()).sample(np.broadcast_to(LOGITS, (1000, 10)), draws) if s]
        counts += np.bincount(tokens, minlength=10)
        noisy = scaled + noise_of_many(seed, range(1000, 10_000), ids)
        counts += np.bincount(ids[noisy.argmax(1)], minlength=10)
    assert counts.sum() == 100_000
    assert (counts[want == 0] == 0).all()
    expected = want[want > 0] * counts.sum()
    assert (((counts[want > 0] - expected) ** 2) / expected).sum() < CRITICAL[len(expected) - 1]


def test_the_long_way_follows_the_distribution_too() -> None:
    """Over a vocabulary where most tokens are never looked at twice: 40 classes of 100 tokens each."""
    vocab, classes = 4000, 40
    row = np.random.default_rng(3).normal(0, 2, classes).astype(np.float32).repeat(100)
    want = np.exp(row[::100].astype(np.float64))
    want /= want.sum()
    draws = [Draw(replace(PARAMS, seed=s), 0, p) for s in range(4) for p in range(2500)]
    tokens = np.array([s.token_id for s in Sampler(()).sample(np.broadcast_to(row, (len(draws), vocab)), draws) if s])
    counts = np.bincount(tokens // 100, minlength=classes)
    expected = want * len(draws)
    assert ((counts - expected) ** 2 / expected).sum() < 72.1  # 99.9 % point at 39 degrees of freedom
    inside = np.bincount(tokens % 100, minlength=100)
    assert ((inside - 100) ** 2 / 100).sum() < 148.2  # at 99


def test_penalised_draws_follow_the_distribution() -> None:
    history = History((3, 3, 9), (2, 2, 6))
    params = replace(
        PARAMS, repetition_penalty=1.5, frequency_penalty=0.4, presence_penalty=-0.3, logit_bias=((8, 2.0),)
    )
    logits = LOGITS.astype(np.float64).copy()
    logits[8] += 2.0
    for seen in (2, 3, 6, 9):
        logits[seen] = logits[seen] / 1.5 if logits[seen] > 0 else logits[seen] * 1.5
    logits[2] -= 2 * 0.4 - 0.3
    logits[6] -= 0.4 - 0.3
    want = exact_distribution(logits, PARAMS)
    draws = [Draw(replace(params, seed=s), 0, p, None, history) for s in range(4) for p in range(5000)]
    tokens = [s.token_id for s in Sampler(()).sample(np.broadcast_to(LOGITS, (len(draws), 10)), draws) if s]
    expected = want * len(draws)
    assert ((np.bincount(tokens, minlength=10) - expected) ** 2 / expected).sum() < CRITICAL[9]
