"""Penalties, bans and biases against transformers' processors and the formulas that vLLM has; and in which order."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from twostroke.core.request import SamplingParams, TokenLogprobs
from twostroke.engine.plan import History
from twostroke.engine.policy import scored_rows
from twostroke.model.sampling import logprobs as logprobs_module
from twostroke.model.sampling import memo as memo_module
from twostroke.model.sampling.adjust import Adjuster
from twostroke.model.sampling.filters import apply_filters
from twostroke.model.sampling.logprobs import Scorer
from twostroke.model.sampling.memo import Memo
from twostroke.model.sampling.sampler import Draw, Sampler
from twostroke.model.sampling.words import WordIndex

VOCAB = 60
PARAMS = SamplingParams(max_tokens=8, temperature=0.0)


def random_case(seed: int) -> tuple[np.ndarray, History]:
    chance = random.Random(seed)
    row = np.random.default_rng(seed).normal(0, 4, VOCAB).astype(np.float32)
    row[chance.randrange(VOCAB)] = 0.0
    draw = lambda count: tuple(chance.randrange(VOCAB) for _ in range(count))  # noqa: E731
    return row, History(draw(chance.randrange(1, 30)), draw(chance.randrange(0, 30)))


def adjusted(row: np.ndarray, history: History, ends: tuple[int, ...] = (), **fields: object) -> np.ndarray:
    changed = row.copy()
    Adjuster().adjust(changed, replace(PARAMS, **fields), history, ends, None)  # type: ignore[arg-type]
    return changed


@pytest.mark.parametrize("penalty", [0.5, 1.3, 2.0])
def test_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    for seed in range(50):
        row, history = random_case(seed)
        ids = torch.tensor([[*history.prompt_ids, *history.output_ids]])
        want = RepetitionPenaltyLogitsProcessor(penalty)(ids, torch.from_numpy(row)[None].clone())[0].numpy()
        assert np.array_equal(adjusted(row, history, repetition_penalty=penalty), want)


def vllm_penalties(row: np.ndarray, history: History, repetition: float, frequency: float, presence: float):
    """Its three formulas in their order, from dense counts."""
    output = np.bincount(history.output_ids, minlength=VOCAB) if history.output_ids else np.zeros(VOCAB)
    prompt = np.bincount(history.prompt_ids, minlength=VOCAB)
    row = row.astype(np.float64)
    scale = np.where((prompt > 0) | (output > 0), repetition, 1.0)
    row = np.where(row > 0, row / scale, row * scale)
    return row - frequency * output - presence * (output > 0)


def test_all_penalties_together_are_those_of_vllm() -> None:
    for seed in range(100):
        row, history = random_case(seed)
        chance = random.Random(seed)
        numbers = (chance.choice((0.7, 1.0, 1.4)), chance.uniform(-2, 2), chance.uniform(-2, 2))
        names = ("repetition_penalty", "frequency_penalty", "presence_penalty")
        got = adjusted(row, history, **dict(zip(names, numbers, strict=True)))
        assert got == pytest.approx(vllm_penalties(row, history, *numbers), abs=1e-5)


def test_frequency_and_presence_penalty_leave_the_prompt_alone() -> None:
    row = np.zeros(VOCAB, np.float32)
    got = adjusted(row, History((1, 2, 2), (2, 3, 3)), frequency_penalty=0.5, presence_penalty=1.0)
    assert got[[1, 2, 3, 4]].tolist() == [0.0, -1.5, -2.0, 0.0]


def test_bad_words_forbid_what_those_of_transformers_forbid_within_the_output() -> None:
    for seed in range(200):
        chance = random.Random(seed)
        row = np.zeros(6, np.float32)
        output = tuple(chance.randrange(6) for _ in range(chance.randrange(0, 6)))
        words = [[chance.randrange(6) for _ in range(chance.randrange(1, 4))] for _ in range(3)]
        processor = NoBadWordsLogitsProcessor(words, eos_token_id=torch.tensor([99]))
        ids = torch.tensor([output], dtype=torch.long).reshape(1, -1)
        want = processor(ids, torch.zeros(1, 6))[0].numpy()
        # The prompt begins no bad word.
        history = History(tuple(words[0][:-1]), output)
        assert np.array_equal(adjusted(row, history, bad_words=tuple(map(tuple, words))), want)


def test_ends_are_forbidden_for_as_long_as_transformers_forbids_them() -> None:
    sampler = Sampler((2, 5))
    row = np.zeros((1, 8), np.float32)
    row[0, [2, 5, 7]] = (9.0, 8.0, 7.0)
    for position in range(5):
        processor = MinNewTokensLengthLogitsProcessor(3, 3, torch.tensor([2, 5, 7]))
        ids = torch.zeros(1, 3 + position, dtype=torch.long)
        want = int(processor(ids, torch.from_numpy(row).clone())[0].argmax())
        (got,) = sampler.sample(row, [Draw(replace(PARAMS, min_tokens=3, stop_token_ids=(7,)), 0, position)])
        assert got is not None
        assert got.token_id == want


def test_a_bias_is_added_before_the_penalties_and_a_bans_result_is_not_moved_by_it() -> None:
    row = np.array([-1.0, 1.0, 0.0, 5.0], np.float32)
    fields = {"logit_bias": ((0, 3.0), (3, 100.0)), "repetition_penalty": 2.0, "bad_words": ((3,),)}
    got = adjusted(row, History((0, 1), ()), **fields)
    assert got.tolist() == [1.0, 0.5, 0.0, -np.inf]


def test_the_callers_logits_stay_as_they_are() -> None:
    rows = np.random.default_rng(1).normal(0, 1, (2, VOCAB)).astype(np.float32)
    before = rows.copy()
    params = replace(PARAMS, repetition_penalty=1.5, logit_bias=((3, 5.0),), bad_words=((4,),), min_tokens=3)
    Sampler((2,)).sample(rows, [Draw(params, 0, 0, None, History((1, 2), (3,)))] * 2)
    assert np.array_equal(rows, before)


@pytest.mark.parametrize("seed", range(20))
def test_filters_keep_what_transformers_warpers_keep(seed: int) -> None:
    """In the order min_p, top_k, top_p: each of its warpers normalises what the one before left."""
    chance = random.Random(seed)
    row = np.random.default_rng(seed).normal(0, 2, VOCAB).astype(np.float32)
    temperature, top_k, top_p, min_p = chance.uniform(0.3, 2), chance.randrange(1, 40), chance.uniform(0.3, 0.99), 0.03
    scores = torch.from_numpy(row)[None]
    for warp in (
        TemperatureLogitsWarper(temperature),
        MinPLogitsWarper(min_p),
        TopKLogitsWarper(top_k),
        TopPLogitsWarper(top_p),
    ):
        scores = warp(None, scores)  # type: ignore[arg-type]
    params = replace(PARAMS, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    kept = apply_filters(row, params)
    assert kept.ids is not None
    assert kept.ids.tolist() == torch.isfinite(scores[0]).nonzero().flatten().tolist()


def test_a_temperature_next_to_nothing_is_greedy() -> None:
    row = np.array([[1.0, 3.0, 3.0, 2.0]], np.float32)
    for temperature in (0.0, 1e-300, 1e-6):
        (got,) = Sampler(()).sample(row, [Draw(replace(PARAMS, temperature=temperature), 0, 0)])
        assert got is not None
        assert got.token_id == 1


@pytest.mark.parametrize("num_top", [0, 1, 5, 60, 80])
def test_logprobs_are_those_of_torch_with_ranks_and_ties_by_id(num_top: int) -> None:
    for seed in range(20):
        row, _ = random_case(seed)
        row[7] = row[9] = row.max() + 1
        want = torch.log_softmax(torch.from_numpy(row).double(), -1)
        order = sorted(range(VOCAB), key=lambda i: (-row[i], i))
        for token_id in (7, 9, 30):
            (got,) = Scorer().score(row[None], (token_id,), num_top)
            assert got.logprob == pytest.approx(float(want[token_id]), abs=1e-5)
            assert got.rank == order.index(token_id) + 1
            assert [i for i, _ in got.top] == order[:num_top]
            assert [lp for _, lp in got.top] == pytest.approx(want[order[:num_top]].tolist(), abs=1e-5)


def plain_logprobs(row: np.ndarray, token_id: int, num_top: int) -> TokenLogprobs:
    """The definition, one row at a time and by a whole sort."""
    best = row.max()
    log_total = float(best) + math.log(float(np.exp(row - best).sum(dtype=np.float64)))
    told = lambda value: float(np.float32(min(float(value) - log_total, 0.0)))  # noqa: E731
    order = np.lexsort((np.arange(len(row)), -row))
    rank = 1 + int(np.flatnonzero(order == token_id)[0])
    return TokenLogprobs(token_id, told(row[token_id]), rank, tuple((int(i), told(row[i])) for i in order[:num_top]))


@pytest.mark.parametrize("vocab", [1, 63, 129, 3000, 20_011])
@pytest.mark.parametrize("num_top", [0, 1, 20])
def test_many_rows_at_once_have_the_bits_of_one_row_alone(monkeypatch, vocab: int, num_top: int) -> None:
    generator = np.random.default_rng(vocab)
    rows = generator.normal(0, 4, (11, vocab)).astype(np.float32)
    rows[3] = np.round(rows[3])  # full of equals
    rows[4] = 1.0
    targets = generator.integers(0, vocab, 11).tolist()
    want = [plain_logprobs(row, target, num_top) for row, target in zip(rows, targets, strict=True)]
    for rows_per_slice in (1, 4, 100):
        monkeypatch.setattr(logprobs_module, "_SLICE_NUMBERS", rows_per_slice * vocab)
        scorer = Scorer()
        for _ in range(2):  # again over what the first time left in its memory
            assert scorer.score(rows, targets, num_top) == want
        assert scorer.score(rows[:2], targets[:2], num_top) == want[:2]


def test_bad_words_are_found_as_by_comparing_each_with_the_output() -> None:
    chance = random.Random(5)
    hits = 0
    for _ in range(300):
        words = tuple(tuple(chance.randrange(3) for _ in range(chance.randrange(1, 6))) for _ in range(12))
        output = tuple(chance.randrange(3) for _ in range(chance.randrange(0, 9)))
        want = [w[-1] for w in words if len(w) - 1 <= len(output) and output[len(output) - len(w) + 1 :] == w[:-1]]
        assert sorted(WordIndex(words).forbidden(output)) == sorted(want)
        hits += any(len(w) > 2 for w in words if w[-1] in want)
    assert hits > 100


def test_a_step_looks_only_at_words_whose_beginning_may_just_have_been_said() -> None:
    """Else a long list costs the neighbours of its request time at every token."""
    index = WordIndex(tuple((*range(100, 350), place, 7 + place) for place in range(128)))
    assert [len(words) for words in index._begun_by.values()] == [1] * 128
    assert index.forbidden((*range(100, 350), 90)) == [97]
    assert index.forbidden((90,)) == []
    assert index.forbidden((89, 128)) == []


def test_what_is_remembered_is_bounded_and_never_of_another_object(monkeypatch) -> None:
    monkeypatch.setattr(memo_module, "MAX_VALUES", 3)
    made: list[tuple[int, ...]] = []
    memo = Memo(lambda key: made.append(key) or sum(key))
    keys = [tuple(range(n)) for n in range(5)]
    assert [memo.of(key) for key in keys] == [0, 0, 1, 3, 6]
    assert memo.of(keys[4]) == 6
    assert len(made) == 5
    assert memo.of(keys[1]) == 0  # was forgotten
    assert len(made) == 6
    assert len(memo._known) == 3
    assert memo.of(tuple(range(2))) == 1  # equal to a known one, and another object
    assert len(made) == 7


def test_logprobs_are_read_before_anything_is_changed() -> None:
    row = np.array([[0.0, 1.0, 2.0]], np.float32)
    params = replace(PARAMS, logprobs=2, logit_bias=((0, 50.0),), temperature=5.0, top_k=1)
    (got,) = Sampler(()).sample(row, [Draw(params, 0, 0)])
    assert got is not None
    assert got.token_id == 0
    assert [got.logprobs] == Scorer().score(row, (0,), 2)
    assert [i for i, _ in got.logprobs.top] == [2, 1]
    assert got.logprobs.rank == 3


def test_what_a_step_may_score_follows_the_vocabulary() -> None:
    sizes = [scored_rows(vocab) for vocab in (1, 4096, 32_000, 128_256, 151_936, 262_144, 1 << 30)]
    assert sizes == sorted(sizes, reverse=True)
    assert all(size % 16 == 0 for size in sizes)
    assert sizes[-1] == 16  # a scored prompt always gets on
    assert (sizes[1], sizes[4]) == (816, 96)
