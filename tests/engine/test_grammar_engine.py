"""Sequences with a grammar through the real core and runner, where masks come late, or not at all."""

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from support.engines.draft_models import drafted
from support.engines.sampling_room import Room, ids_of, submit
from support.fakes.guesses import guessing

from twostroke.core.errors import InternalError, InvalidRequest
from twostroke.core.request import FinishReason, Grammar, SamplingParams
from twostroke.engine.link.messages import Ended, PeerBound, Progress, Source
from twostroke.model.drafter import ModelDrafter
from twostroke.prefill_worker.policy import prefill_policy
from twostroke.text.grammar import GrammarFailed

VOCAB_BYTES = 20  # of a tiny model's 160 tokens
PARAMS = SamplingParams(max_tokens=12, temperature=0.9, seed=7, grammar=Grammar("regex", "odd"), logprobs=1)


class EveryThird:
    """Matcher that allows the ids whose remainder by 3 is the number of ids taken so far, modulo 3."""

    def __init__(self) -> None:
        self._num_taken = 0

    def advance(self, token_ids: Sequence[int]) -> None:
        self._num_taken += len(token_ids)

    def copy(self) -> "EveryThird":
        return copy.copy(self)

    def mask(self) -> bytes:
        bits = sum(1 << id_ for id_ in range(3, VOCAB_BYTES * 8) if id_ % 3 == self._num_taken % 3)
        return bits.to_bytes(VOCAB_BYTES, "little")


class Late:
    """Masks of which each is ready only when it was asked for `patience` times."""

    def __init__(self, masks: Any, patience: int) -> None:
        self._masks, self._patience = masks, patience
        self._asked: Counter[Any] = Counter()
        self.num_deferred = 0

    def begin(self, plan: Any) -> None:
        self._masks.begin(plan)

    def take(self, plan: Any, last: Any) -> Any:
        made = self._masks.take(plan, last)
        while made.deferred:
            made = self._masks.take(plan, last)
        late = set()
        for step in plan.sequences:
            row = (step.key, step.num_generated)
            if step.key in made.ready and self._asked[row] < self._patience:
                self._asked[row] += 1
                late.add(step.key)
        self.num_deferred += len(late)
        ready = {key: mask for key, mask in made.ready.items() if key not in late}
        return made._replace(ready=ready, deferred=frozenset(late))


@pytest.fixture
def make_room(write_tiny, make_runner):
    def make(patience: int = 0, policy: Any = None, **limits: Any) -> Room:
        runner = make_runner(write_tiny({}), dtype="float32", kv_dtype="float32")
        runner.serve_grammars(lambda _: EveryThird())
        runner._masks = Late(runner._masks, patience)
        return Room(runner, **({"policy": policy} if policy else {}), **limits)

    return make


def told(room: Room, name: str) -> Any:
    return room.tokens[name], room.logprobs[name], room.prompt_logprobs.get(name)


@pytest.mark.parametrize("length", [1, 16, 17, 50])
def test_masks_that_come_late_change_nothing(make_room, length: int):
    params = replace(PARAMS, prompt_logprobs=1)
    whole = make_room().run(submit("a", ids_of(length), params))
    assert [id_ % 3 for id_ in whole.tokens["a"]] == [number % 3 for number in range(12)]
    assert whole.ended["a"].reason is FinishReason.LENGTH
    late = make_room(patience=2, max_batch_tokens=16).run(submit("a", ids_of(length), params))
    assert late.runner._masks.num_deferred >= 24
    assert told(late, "a") == told(whole, "a")


def test_the_others_of_a_step_do_not_wait(make_room):
    free = replace(PARAMS, grammar=None)
    alone = make_room().run(submit("free", ids_of(20), free))
    room = make_room(patience=3)
    room.send(submit("slow", ids_of(20), PARAMS), submit("free", ids_of(20), free))
    for _ in range(13):
        room.step()
    assert told(room, "free") == told(alone, "free")
    assert len(room.tokens["slow"]) < 6
    room.run()
    assert room.tokens["slow"] == make_room().run(submit("slow", ids_of(20), PARAMS)).tokens["slow"]


def test_a_preempted_and_a_resumed_sequence_say_the_same(make_room):
    prompt = ids_of(30)
    whole = make_room().run(submit("a", prompt, PARAMS)).tokens["a"]
    crowded = make_room(patience=1, num_blocks=6)
    crowded.run(*(submit(name, prompt if name == "a" else ids_of(30, 2), PARAMS) for name in ("b", "a")))
    assert crowded.core.load(0.0).counters
    assert crowded.tokens["a"] == whole
    for at in range(1, 12):
        room = make_room().run(submit("a", (*prompt, *whole[:at]), PARAMS, num_emitted=at))
        assert room.tokens["a"] == whole[at:]


def test_a_prompt_for_a_peer_reports_whole_blocks_while_its_mask_is_late(make_room):
    room = make_room(patience=2, policy=prefill_policy)
    heard: list[Any] = []
    hear = room.hear
    room.hear = lambda events: (heard.extend(events), hear(events))
    room.send(submit("a", ids_of(40), PARAMS, Source.FOR_PEER))
    room.step()
    room.send(PeerBound(submit("a", ids_of(40), PARAMS).key))
    room.run()
    reported = [event.num_computed for event in heard if isinstance(event, Progress)]
    assert all(count % 16 == 0 for count in reported[:-1])
    assert reported[-1] == 40
    assert room.tokens["a"] == make_room().run(submit("a", ids_of(40), PARAMS)).tokens["a"][:1]
    assert not any(isinstance(event, Ended) for event in heard)


def test_a_worker_without_masks_ends_the_sequence_and_says_no_token(write_tiny, make_runner):
    room = Room(make_runner(write_tiny({}), dtype="float32", kv_dtype="float32"))
    room.run(submit("a", ids_of(20), PARAMS), submit("b", ids_of(20), replace(PARAMS, grammar=None)))
    assert room.ended["a"].reason is FinishReason.ERROR
    assert "structured_outputs" in room.ended["a"].error_message
    assert "a" not in room.tokens
    assert len(room.tokens["b"]) == 12


class Narrow(EveryThird):
    """Matcher that fails at its third token."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self._error = error

    def mask(self) -> bytes:
        if self._num_taken == 2:
            raise self._error
        return super().mask()


@pytest.mark.parametrize(
    ("error", "code"),
    [(GrammarFailed("too many items"), InvalidRequest.code), (RuntimeError("planted"), InternalError.code)],
)
def test_a_grammar_that_passes_a_limit_is_its_clients_fault(write_tiny, make_runner, error: Exception, code: str):
    runner = make_runner(write_tiny({}), dtype="float32", kv_dtype="float32")
    runner.serve_grammars(lambda _: Narrow(error))
    room = Room(runner)
    room.run(submit("a", ids_of(20), PARAMS), submit("b", ids_of(20), replace(PARAMS, grammar=None)))
    assert room.ended["a"].error_code == code
    assert room.ended["a"].error_message == f"structured_outputs: {error}"
    assert len(room.tokens["a"]) == 2
    assert len(room.tokens["b"]) == 12


@pytest.mark.parametrize("wrong", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("patience", [0, 1])
def test_guesses_change_no_token_of_a_grammar(make_room, patience: int, wrong: float):
    params = replace(PARAMS, max_tokens=30, prompt_logprobs=1, frequency_penalty=0.4)
    work = [submit(f"g{n}", ids_of(length, n), params) for n, length in enumerate((1, 15, 16, 40))]
    work.append(submit("free", ids_of(20), replace(params, grammar=None)))
    plain = make_room().run(*work)
    texts = {w.key.request_id: (*w.prompt_ids, *plain.tokens[w.key.request_id]) for w in work}
    for most in (1, 4, 20):
        room = make_room(patience, speculation=guessing(texts, most, wrong)).run(*work)
        for command in work:
            assert told(room, command.key.request_id) == told(plain, command.key.request_id)
        counters = room.core.counters
        assert counters["spec_decode_num_draft_tokens"] > 0
        assert bool(counters["spec_decode_num_accepted_tokens"]) == (wrong < 1.0)
        assert room.pool.num_live == 0


def test_a_late_mask_gives_back_the_blocks_of_its_guesses(make_room):
    command = submit("g", ids_of(15), replace(PARAMS, max_tokens=30))
    plain = make_room().run(command).tokens["g"]
    room = make_room(patience=1, speculation=guessing({"g": (*command.prompt_ids, *plain)}, 20, 0.0))
    room.send(command)
    num_late = 0
    while room.step() and "g" not in room.ended:
        num_tokens = 15 + len(room.tokens.get("g", ()))
        assert room.pool.num_live <= -(-num_tokens // 16)
        num_late += num_tokens == 16
    assert num_late > 1  # the first guess would have filled the second block
    assert room.tokens["g"] == plain


@pytest.mark.parametrize("patience", [0, 2])
def test_guesses_of_a_draft_model_change_no_token_of_a_grammar(make_room, write_tiny, make_runner, patience: int):
    """It does not ask the grammar: two of three of its guesses are forbidden."""
    params = replace(PARAMS, max_tokens=40, logit_bias=((40, 3.0), (41, 3.0), (42, 3.0)))
    work = [submit(f"a{n}", ids_of(20, n), params) for n in range(3)]
    plain = make_room().run(*work)
    drafter = ModelDrafter(make_runner(write_tiny({}), dtype="float32", kv_dtype="float32"))
    room = make_room(patience, speculation=drafted(3), drafter=drafter).run(*work)
    for command in work:
        assert told(room, command.key.request_id) == told(plain, command.key.request_id)
    counters = room.core.counters
    assert 0 < counters["draft_model_accepted_tokens"] < counters["draft_model_draft_tokens"]
    assert room.core._scheduler.guess_planner.holdings.pool.num_live == 0
