"""Structured output in the sampler: random schemas, resumption, neighbours, failures. No weights."""

import json
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from support.checkpoints.schemas import random_schema

from twostroke.core.request import Grammar, SamplingParams, SequenceKey
from twostroke.engine.plan import History, SampledPlace, SequenceStep, StepPlan
from twostroke.model.sampling import masks as masks_file
from twostroke.model.sampling.masks import GrammarMasks, Masks
from twostroke.model.sampling.sampler import Draw, Sampled, Sampler
from twostroke.text.grammar import GrammarCompiler
from twostroke.text.grammar_program import grammar_of
from twostroke.text.tokenizer import Tokenizer

BUNDLED = Path(__file__).resolve().parents[2] / "model" / "bundled"
VOCAB = 4096
TOKENIZER = Tokenizer.load(BUNDLED)
EOS = frozenset(TOKENIZER.eos_ids)
COMPILER = GrammarCompiler(TOKENIZER, VOCAB, EOS)
FREE = SamplingParams(max_tokens=64, temperature=0.8, top_p=0.9, seed=5)


def logits_of(key: SequenceKey, position: int) -> np.ndarray:
    """Logits of one row: a function of its sequence and position, as a model's are of its prefix."""
    return (
        np.random.default_rng([*key.request_id.encode(), key.choice, position]).normal(0, 3, VOCAB).astype(np.float32)
    )


class Batch:
    """Choices that decode together, one token per step, as a runner and a scheduler would run them."""

    def __init__(self, start: Any = COMPILER.start) -> None:
        self.masks = GrammarMasks(start)
        self.sampler = Sampler(tuple(EOS))
        self.params: dict[SequenceKey, SamplingParams] = {}
        self.ids: dict[SequenceKey, list[int]] = {}
        self.failed: dict[SequenceKey, Exception] = {}
        self.num_deferred = 0

    def add(self, key: SequenceKey, params: SamplingParams, ids: Sequence[int] = ()) -> None:
        self.params[key], self.ids[key] = params, list(ids)

    def is_over(self, key: SequenceKey) -> bool:
        ids = self.ids[key]
        return key in self.failed or len(ids) >= self.params[key].max_tokens or (bool(ids) and ids[-1] in EOS)

    def run(self, most_steps: int = 10_000) -> None:
        for number in range(most_steps):
            keys = [key for key in self.ids if not self.is_over(key)]
            if not keys:
                return
            self.step(number, keys)
        raise AssertionError("no end")

    def step(self, number: int, keys: Sequence[SequenceKey]) -> None:
        steps = tuple(
            SequenceStep(
                key, len(self.ids[key]), (0,), (), (), True, self.params[key], len(self.ids[key]),
                history=History((), tuple(self.ids[key])) if self.params[key].needs_history else None,
            )
            for key in keys
        )  # fmt: skip
        plan = StepPlan(number, steps)
        self.masks.begin(plan)
        made: Masks = self.masks.take(plan, [0] * len(keys))
        self.failed |= made.failed
        self.num_deferred += len(made.deferred)
        draws = [
            None
            if step.params.grammar is not None and step.key not in made.ready
            else Draw(
                step.params, step.key.choice, step.num_generated, made.ready.get(step.key, (None,))[0], step.history
            )
            for step in steps
        ]
        rows = np.stack([logits_of(step.key, step.num_generated) for step in steps])
        for step, draw, outcome in zip(steps, draws, self.sampler.sample(rows, draws), strict=True):
            if draw is not None:
                assert isinstance(outcome, Sampled), (step.key, outcome)
                self.ids[step.key].append(outcome.token_id)


def params_of(rule: dict[str, Any], **others: Any) -> SamplingParams:
    return replace(SamplingParams(max_tokens=160, seed=3, grammar=grammar_of(rule)), **others)


def text_of(ids: Sequence[int]) -> str:
    return TOKENIZER.decode([id_ for id_ in ids if id_ not in EOS], skip_special_tokens=False)


def run_alone(key: SequenceKey, params: SamplingParams, ids: Sequence[int] = ()) -> list[int]:
    batch = Batch()
    batch.add(key, params, ids)
    batch.run()
    return batch.ids[key]


# ---------------------------------------------------------------- random schemas


def check_random_schemas(first: int, count: int) -> None:
    """Every text that ended is valid; every mask is a function of the tokens before it."""
    batch = Batch()
    schemas = {}
    for number in range(first, first + count):
        schema = random_schema(random.Random(number))
        for choice in range(3 if number % 10 == 0 else 1):
            key = SequenceKey(f"s{number}", choice)
            schemas[key] = schema
            batch.add(key, params_of({"json": schema}, max_tokens=96))
    batch.run()
    assert not batch.failed
    num_ended = 0
    for key, schema in schemas.items():
        ids = batch.ids[key]
        if ids[-1] in EOS:
            num_ended += 1
            jsonschema.Draft202012Validator(schema).validate(json.loads(text_of(ids)))
    assert num_ended >= 0.8 * len(schemas), f"only {num_ended} of {len(schemas)} texts ended"


def test_every_text_of_200_random_schemas_that_ended_is_valid():
    check_random_schemas(0, 200)


@pytest.mark.campaign
def test_every_text_of_1000_random_schemas_that_ended_is_valid():
    for first in range(1000, 2000, 100):
        check_random_schemas(first, 100)


def test_a_choice_resumed_at_any_token_says_the_same():
    for number in range(2):
        key, params = SequenceKey(f"r{number}", number % 3), params_of({"json": random_schema(random.Random(number))})
        whole = run_alone(key, params)
        resumed = Batch()
        for at in range(len(whole)):
            found = Batch()
            found.masks = resumed.masks  # a matcher of other tokens is kept under the same key
            found.add(key, params, whole[:at])
            found.run()
            assert found.ids[key] == whole, f"resumed after {at} tokens"
        assert run_alone(key, params, whole[: len(whole) // 2]) == whole


def test_rows_without_a_grammar_keep_their_bits_beside_others():
    alone, beside = Batch(), Batch()
    for number in range(4):
        for batch in (alone, beside):
            batch.add(SequenceKey(f"f{number}", 0), FREE)
        beside.add(SequenceKey(f"g{number}", 0), params_of({"json": random_schema(random.Random(number))}))
    alone.run()
    beside.run()
    assert {key: beside.ids[key] for key in alone.ids} == alone.ids


def test_company_changes_no_token_of_a_grammar():
    params = params_of({"json": random_schema(random.Random(1))})
    batch = Batch()
    for number in range(5):
        batch.add(SequenceKey(f"c{number}", 0), params)
    batch.run()
    for key, ids in batch.ids.items():
        assert run_alone(key, params) == ids


def test_each_of_three_choices_has_its_own_state():
    batch = Batch()
    for choice in range(3):
        batch.add(SequenceKey("n", choice), params_of({"regex": "[a-z]{12}"}))
    batch.run()
    texts = [text_of(ids) for ids in batch.ids.values()]
    assert all(len(text) == 12 for text in texts)
    assert len(set(texts)) == 3


# ---------------------------------------------------------------- beside other parameters


def test_the_end_comes_where_the_grammar_is_complete_and_nowhere_else():
    ids = run_alone(SequenceKey("e", 0), params_of({"regex": "ab?c{3}"}))
    assert text_of(ids) in ("accc", "abccc")
    assert ids[-1] in EOS
    assert sum(id_ in EOS for id_ in ids) == 1


def test_max_tokens_ends_a_text_that_is_not_complete():
    ids = run_alone(SequenceKey("m", 0), params_of({"regex": "[a-z]{40}"}, max_tokens=3))
    assert len(ids) == 3
    assert not EOS & set(ids)


def pieces(word: str) -> tuple[tuple[int, ...], ...]:
    """Every token that is a part of a word."""
    parts = {word[i:j] for i in range(len(word)) for j in range(i + 1, len(word) + 1)}
    found = (TOKENIZER.backend.token_to_id(part) for part in parts)
    return tuple((id_,) for id_ in found if id_ is not None)


def test_a_bad_word_is_avoided_where_the_grammar_has_another():
    for word, expected in (("yes", "no"), ("no", "yes")):
        params = params_of({"choice": ["yes", "no"]}, bad_words=pieces(word))
        assert text_of(run_alone(SequenceKey("b", 0), params)) == expected


def test_a_bad_word_that_the_grammar_needs_is_said():
    params = params_of({"choice": ["yes"]}, bad_words=pieces("yes"))
    assert text_of(run_alone(SequenceKey("b", 1), params)) == "yes"


def test_ends_are_allowed_before_min_tokens_where_nothing_else_is():
    assert text_of(run_alone(SequenceKey("t", 0), params_of({"choice": ["yes"]}, min_tokens=50))) == "yes"


def test_a_bias_chooses_among_allowed_tokens_only():
    no = TOKENIZER.encode("no", add_special_tokens=False)[0]
    biased = params_of({"choice": ["yes", "no"]}, logit_bias=((no, 100.0), (500, 100.0)))
    assert text_of(run_alone(SequenceKey("l", 0), biased)) == "no"


def test_greedy_sampling_takes_the_likeliest_allowed_token():
    ids = run_alone(SequenceKey("g", 0), params_of({"regex": "[0-9]"}, temperature=0.0))
    digits = [
        id_
        for id_ in range(VOCAB)
        if len(TOKENIZER.token(id_) or "") == 1 and (TOKENIZER.token(id_) or "") in "0123456789"
    ]
    row = logits_of(SequenceKey("g", 0), 0)
    assert ids[0] == max(digits, key=lambda id_: row[id_])


# ---------------------------------------------------------------- failures and slow grammars


def test_one_grammar_that_fails_ends_its_own_sequence_only():
    def start(grammar: Grammar) -> Any:
        if grammar.source == "z":
            raise RuntimeError("planted")
        return COMPILER.start(grammar)

    batch = Batch(start)
    good, bad, free = (SequenceKey(name, 0) for name in ("good", "bad", "free"))
    batch.add(good, params_of({"regex": "[a-c]{5}"}))
    batch.add(bad, params_of({"regex": "z"}))
    batch.add(free, FREE)
    batch.run()
    assert set(batch.failed) == {bad}
    assert len(text_of(batch.ids[good])) == 5
    assert batch.ids[free]


def test_tokens_that_the_grammar_forbids_fail_the_sequence():
    batch = Batch()
    key = SequenceKey("x", 0)
    batch.add(key, params_of({"regex": "[a-c]{5}"}), TOKENIZER.encode("zz", add_special_tokens=False))
    batch.run()
    assert set(batch.failed) == {key}


def test_a_slow_grammar_waits_and_the_others_go_on():
    go = threading.Event()

    def start(grammar: Grammar) -> Any:
        if grammar.source == "[x]{3}":
            assert go.wait(60)
        return COMPILER.start(grammar)

    batch = Batch(start)
    slow, quick = SequenceKey("slow", 0), SequenceKey("quick", 0)
    batch.add(slow, params_of({"regex": "[x]{3}"}))
    batch.add(quick, params_of({"regex": "[y]{3}"}))
    number = 0
    while not batch.is_over(quick):
        batch.step(number, [key for key in batch.ids if not batch.is_over(key)])
        number += 1
    assert batch.ids[slow] == []
    go.set()
    batch.run()
    assert text_of(batch.ids[slow]) == "xxx"
    assert batch.ids[slow] == run_alone(slow, batch.params[slow])


def test_a_grammar_that_never_comes_ends_its_sequence_and_later_ones_get_threads(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(masks_file, "OVERDUE_S", 0.02)
    go = threading.Event()

    def start(grammar: Grammar) -> Any:
        if grammar.source.startswith("never"):
            go.wait(60)
        return COMPILER.start(grammar)

    batch = Batch(start)
    try:
        for number in range(masks_file.THREADS):
            batch.add(SequenceKey(f"never{number}", 0), params_of({"regex": f"never{number}"}))
        batch.run()
        assert len(batch.failed) == masks_file.THREADS
        monkeypatch.undo()
        batch.add(SequenceKey("later", 0), params_of({"regex": "[a]{3}"}))
        batch.run()
        assert text_of(batch.ids[SequenceKey("later", 0)]) == "aaa"
    finally:
        go.set()


def test_threads_that_were_given_up_are_bounded_and_count_until_they_end(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(masks_file, "OVERDUE_S", 0.02)
    monkeypatch.setattr(masks_file, "MAX_STUCK", masks_file.THREADS)
    go = threading.Event()

    def start(grammar: Grammar) -> Any:
        if grammar.source.startswith("never"):
            go.wait(60)
        return COMPILER.start(grammar)

    batch = Batch(start)
    for number in range(masks_file.THREADS):
        batch.add(SequenceKey(f"never{number}", 0), params_of({"regex": f"never{number}"}))
    batch.run()
    monkeypatch.setattr(masks_file, "OVERDUE_S", 60.0)
    refused, taken = SequenceKey("refused", 0), SequenceKey("taken", 0)
    batch.add(refused, params_of({"regex": "[a]{3}"}))
    batch.run()
    assert "too many grammars took too long" in str(batch.failed[refused])
    go.set()
    end_s = time.monotonic() + 60
    while taken not in batch.ids or taken in batch.failed:  # the threads end when they get a core
        assert time.monotonic() < end_s
        batch.failed.pop(taken, None)
        batch.add(taken, params_of({"regex": "[a]{3}"}))
        batch.run()
    assert text_of(batch.ids[taken]) == "aaa"


class Laggard:
    """A matcher that takes ids slowly, or fails at the first ones."""

    def __init__(self, fails: bool = False) -> None:
        self.taken: list[int] = []
        self.fails = fails

    def advance(self, token_ids: Sequence[int]) -> None:
        self.taken += token_ids
        if self.fails:
            raise RuntimeError("planted")
        time.sleep(0.03)

    def mask(self) -> bytes:
        return b"\xff" * (VOCAB // 8)


def test_a_long_text_that_is_read_again_slowly_ends_in_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(masks_file, "OVERDUE_S", 0.1)
    monkeypatch.setattr(masks_file, "WAIT_S", 60.0)
    matchers = list[Laggard]()

    def start(grammar: Grammar) -> Any:
        matchers.append(Laggard())
        return matchers[-1]

    batch, key = Batch(start), SequenceKey("long", 0)
    batch.add(key, params_of({"regex": "x"}, max_tokens=9_000), [300] * 8_000)
    batch.run()
    assert isinstance(batch.failed[key], TimeoutError)
    (matcher,) = matchers
    assert len(matcher.taken) < 8_000
    taken = len(matcher.taken)
    time.sleep(0.1)
    assert len(matcher.taken) == taken, "its thread is free"


def test_a_matcher_that_failed_is_not_used_again():
    matchers = list[Laggard]()

    def start(grammar: Grammar) -> Any:
        matchers.append(Laggard(fails=not matchers))
        return matchers[-1]

    masks, key = GrammarMasks(start), SequenceKey("again", 0)
    step = SequenceStep(key, 2, (0,), (), (), True, params_of({"regex": "x"}), 2, history=History((), (1, 2)))
    for number in range(2):
        end_s, made = time.monotonic() + 60, None
        while made is None or made.deferred:
            assert time.monotonic() < end_s
            plan = StepPlan(number, (step,))
            masks.begin(plan)
            made = masks.take(plan, [0])
        assert bool(made.failed) == (number == 0)
    assert [matcher.taken for matcher in matchers] == [[1, 2], [1, 2]]


def test_grammars_that_waited_long_for_a_thread_are_not_overdue(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(masks_file, "OVERDUE_S", 0.5)

    def start(grammar: Grammar) -> Any:
        time.sleep(0.2)
        return COMPILER.start(grammar)

    batch = Batch(start)
    for number in range(5 * masks_file.THREADS):  # the last ones wait 0.8 s
        batch.add(SequenceKey(f"k{number}", 0), params_of({"regex": f"[a]{{3}}{number}"}))
    batch.run()
    assert batch.failed == {}


def test_the_mask_of_the_row_before_is_never_taken_for_this_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(masks_file, "WAIT_S", 20.0)
    go = threading.Event()

    class Counting:
        ids: tuple[int, ...] = ()

        def advance(self, token_ids: Sequence[int]) -> None:
            self.ids += tuple(token_ids)

        def mask(self) -> bytes:
            assert self.ids or go.wait(60)
            return bytes(self.ids)

    masks = GrammarMasks(lambda _: Counting())
    key = SequenceKey("a", 0)
    step = SequenceStep(
        key, 4, (0,), (), (), True, params_of({"regex": "a"}), 1, from_place=SampledPlace(0, 0), history=History((), ())
    )
    plan = StepPlan(1, (step,))
    masks.begin(plan)  # without the id that the running step samples
    threading.Timer(0.05, go.set).start()
    assert masks.take(plan, [7]) == Masks({}, {}, frozenset({key}))
    assert masks.take(plan, [7]) == Masks({key: (bytes((7,)),)}, {}, frozenset())


def test_kept_matchers_are_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(masks_file, "MAX_MATCHERS", 4)
    batch = Batch()
    for number in range(9):
        key = SequenceKey(f"k{number}", 0)
        batch.add(key, params_of({"choice": ["yes"]}))
        batch.run()
    assert batch.masks.num_matchers == 4


class Kept:
    """Masks over matchers that only count; every start of one is noted."""

    def __init__(self) -> None:
        self.starts: list[str] = []
        self.faults: list[Exception] = []  # of the next starts
        self.masks = GrammarMasks(self._start)

    def _start(self, grammar: Grammar) -> Any:
        self.starts.append(grammar.source)
        if self.faults:
            raise self.faults.pop()
        return Ids()

    def take(self, name: str, source: str, *ids: int) -> Masks:
        """Masks of a plan with one sequence."""
        key, params = SequenceKey(name, 0), params_of({"regex": source})
        step = SequenceStep(key, len(ids), (0,), (), (), True, params, len(ids), history=History((), ids))
        plan = StepPlan(len(ids), (step,))
        self.masks.begin(plan)
        return self.masks.take(plan, [0])


class Ids:
    """A matcher whose mask is the ids that it has taken."""

    def __init__(self) -> None:
        self._ids: tuple[int, ...] = ()

    def advance(self, token_ids: Sequence[int]) -> None:
        self._ids += tuple(token_ids)

    def mask(self) -> bytes:
        return bytes(self._ids)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Kept:
    monkeypatch.setattr(masks_file, "WAIT_S", 60.0)
    monkeypatch.setattr(masks_file, "MAX_MATCHERS", 2)
    return Kept()


def test_the_matcher_that_was_used_longest_ago_goes(kept: Kept):
    for name, *ids in (("a",), ("b",), ("a", 1), ("c",), ("a", 1, 2)):
        kept.take(name, name, *ids)
    assert kept.starts == ["a", "b", "c"]
    kept.take("b", "b", 1)
    assert kept.starts == ["a", "b", "c", "b"]


def test_a_key_that_comes_with_another_grammar_gets_its_masks(kept: Kept):
    kept.take("a", "x", 1)
    kept.take("a", "y", 1, 2)
    assert kept.starts == ["x", "y"]


def test_a_failure_is_told_once_and_the_key_may_come_again(kept: Kept):
    kept.faults = [RuntimeError("planted")]
    key = SequenceKey("a", 0)
    assert set(kept.take("a", "x", 7).failed) == {key}
    assert kept.masks.num_matchers == 0
    assert kept.take("a", "x", 7) == Masks({key: (bytes((7,)),)}, {}, frozenset())


def test_a_kept_matcher_of_other_ids_is_made_anew(kept: Kept):
    for ids in ((1,), (1, 2), (1, 3, 4), (5,)):
        assert kept.take("a", "x", *ids).ready == {SequenceKey("a", 0): (bytes(ids),)}
    assert kept.starts == ["x"] * 3


# ---------------------------------------------------------------- guessed tokens


def masks_of(batch_masks: GrammarMasks, params: SamplingParams, ids: Sequence[int], drafts: Sequence[int]) -> Masks:
    key = SequenceKey("g", 0)
    step = SequenceStep(
        key, len(ids), (0,), (), (), True, params, len(ids), history=History((), tuple(ids)), draft_ids=tuple(drafts)
    )
    plan = StepPlan(len(ids), (step,))
    batch_masks.begin(plan)
    return batch_masks.take(plan, [0])


@pytest.mark.parametrize("number", range(12))
def test_masks_behind_guesses_are_those_of_the_text_with_them(monkeypatch: pytest.MonkeyPatch, number: int):
    monkeypatch.setattr(masks_file, "WAIT_S", 20.0)
    params = params_of({"json": random_schema(random.Random(number))}, max_tokens=96)
    whole = run_alone(SequenceKey(f"s{number}", 0), params)
    kept = GrammarMasks(COMPILER.start)
    draw = random.Random(number)
    for at in range(0, len(whole) - 1, 3):
        right = whole[at : at + draw.randint(1, 5)]
        wrong = [draw.randrange(VOCAB) if draw.random() < 0.2 else id_ for id_ in right]
        (made,) = masks_of(kept, params, whole[:at], wrong).ready.values()
        for row, mask in enumerate(made):
            fresh = COMPILER.start(params.grammar)  # type: ignore[arg-type]
            fresh.advance((*whole[:at], *wrong[:row]))
            assert mask == fresh.mask(), (at, row)
        num_right = next((place for place, (a, b) in enumerate(zip(wrong, right, strict=True)) if a != b), len(right))
        ends = sum(id_ in EOS for id_ in right[:num_right])
        assert len(made) >= 1 + num_right - ends, "a guess that is right has the mask of the row behind it"


def test_a_mask_is_made_for_no_row_behind_a_guess_that_the_grammar_forbids(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(masks_file, "WAIT_S", 20.0)
    params = params_of({"choice": ["yes", "no"]})
    (letter,) = TOKENIZER.encode("x", add_special_tokens=False)[-1:]
    (made,) = masks_of(GrammarMasks(COMPILER.start), params, (), (letter, letter)).ready.values()
    assert len(made) == 1


def test_masks_of_other_guesses_are_used_as_far_as_they_are_the_same(monkeypatch: pytest.MonkeyPatch):
    """A plan whose masks were late may come again with fewer guesses, or others."""
    monkeypatch.setattr(masks_file, "WAIT_S", 20.0)
    params = params_of({"regex": "[a-z ]*"})
    ids = TOKENIZER.encode("one two three four", add_special_tokens=False)
    kept = GrammarMasks(COMPILER.start)
    (whole,) = masks_of(kept, params, (), ids).ready.values()
    assert len(whole) == len(ids) + 1
    (same,) = masks_of(kept, params, (), (*ids[:2], ids[0])).ready.values()
    assert same == whole[:3]
