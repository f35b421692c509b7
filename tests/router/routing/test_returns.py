"""Returns: a prefill worker fetches what decode workers hold of a prompt, where that is cheaper than computing it."""

import json
from dataclasses import replace

import pytest

from twostroke.core.request import Role
from twostroke.kv.spec import attention_spec
from twostroke.router.routing.candidates import PolicyLimits, RequestFacts, Source, WorkerView
from twostroke.router.routing.coefficients import Coefficients
from twostroke.router.routing.facts import WorkerKey
from twostroke.router.routing.policy import choose
from twostroke.router.routing.recorded import asked_from_json, asked_to_json
from twostroke.router.routing.returns import RETURNS, has_more, returns_to

DECODE = WorkerView(
    key=WorkerKey("d0", 1),
    address="h:1",
    role=Role.DECODE,
    numerics=b"x",
    capabilities=(RETURNS,),
    kv_spec=attention_spec(2, 4, 16, 1),
    num_ranks=1,
    coefficients=Coefficients(1.0, 0.0, 10.0, 1e9),
    kv_bytes_per_token=100_000,
    queued_prefill_tokens=0,
    queued_prefill_pairs=0.0,
    num_decoding=0,
    max_num_seqs=64,
    free_kv_tokens=100_000,
    in_flight=0,
)
OTHER = replace(DECODE, key=WorkerKey("d1", 1))
PREFILL = replace(DECODE, key=WorkerKey("p0", 1), role=Role.PREFILL)
SECOND = replace(PREFILL, key=WorkerKey("p1", 1))
LIMITS = PolicyLimits(local_prefill=False)
NEW = RequestFacts("r", 1200, 100, is_resumed=False)
HOLDS = (Source(DECODE, 60),)


def chosen(workers=(DECODE, PREFILL), held=None, sources=HOLDS, request=NEW, limits=LIMITS):
    held = {"d0": 60, "p0": 40} if held is None else held
    choice = choose(request, workers, held, limits, sources)
    assert choice is not None
    return choice


def slow(worker, bytes_per_s):
    return replace(worker, coefficients=replace(worker.coefficients, handover_bytes_per_s=bytes_per_s))


def test_an_answer_is_fetched_where_computing_it_takes_longer():
    choice = chosen()
    winner = choice.winner
    assert (winner.name, winner.computes) == ("d0 >> p0 > d0", PREFILL)
    assert (winner.prefill_held_tokens, winner.decode_held_tokens) == (960, 960)
    assert winner.terms.fetch_ms == LIMITS.handover_fixed_ms + 320 * 0.1
    assert winner.terms.prefill_ms == 240.0
    assert winner.terms.load_penalty_ms == 0.2 * 240.0, "work that is not done delays nobody"
    assert choice.returns == {"p0": HOLDS}
    assert "after blocks fetched from d0" in choice.reason


def test_an_answer_is_computed_where_the_link_is_slower():
    # 320 tokens: computing them costs 320 ms and a fifth more for others; 32 MB at 8e7 bytes/s take 400 ms.
    assert chosen().winner.returns
    for link in ("prefill", "source"):
        p = slow(PREFILL, 8e7) if link == "prefill" else PREFILL
        s = slow(DECODE, 8e7) if link == "source" else DECODE
        choice = chosen(workers=(DECODE, p), sources=(Source(s, 60),))
        assert (choice.winner.returns, choice.winner.prefill_held_tokens, choice.returns) == ((), 640, {}), link
        assert choice.winner.terms.fetch_ms == 0.0


def test_only_what_the_prefill_worker_lacks_counts():
    assert not chosen(held={"d0": 60, "p0": 60}).winner.returns
    one = chosen(held={"d0": 60, "p0": 59}).winner
    assert one.terms.fetch_ms == LIMITS.handover_fixed_ms + 1.6


def test_the_last_token_is_always_computed():
    # The decode worker that is chosen holds nothing; the prefill worker gets all whole blocks before the last token.
    winner = chosen(workers=(OTHER, PREFILL), request=replace(NEW, prompt_tokens=960), held={"p0": 0}).winner
    assert (winner.prefill_held_tokens, winner.returns) == (944, HOLDS)


def test_a_throttled_prefill_worker_saves_more():
    hot = replace(PREFILL, slowdown=3.0)
    winner = chosen(workers=(DECODE, hot)).winner
    assert winner.returns
    assert winner.terms.throttle_ms == 2.0 * 240.0


@pytest.mark.parametrize("without", [PREFILL, DECODE])
def test_a_worker_of_an_older_release_fetches_nothing_and_passes_nothing_on(without):
    older = [replace(w, capabilities=()) if w is without else w for w in (DECODE, PREFILL)]
    assert not chosen(workers=older).winner.returns


def test_sources_are_decode_workers_that_the_prefill_worker_can_read():
    strange = replace(DECODE, key=WorkerKey("d2", 1), numerics=b"y")
    int8 = replace(DECODE, key=WorkerKey("d3", 1), kv_spec=attention_spec(2, 4, 16, 5))
    fp8 = replace(PREFILL, kv_spec=attention_spec(2, 4, 16, 0))
    sources = [Source(strange, 90), Source(SECOND, 80), Source(OTHER, 61), Source(DECODE, 60), Source(DECODE, 50)]
    assert [(s.view.worker_id, s.blocks) for s in returns_to(PREFILL, DECODE, sources)] == [("d1", 61), ("d0", 60)]
    assert returns_to(fp8, DECODE, [Source(int8, 60)]) == (), "what was rounded once is not rounded to another codec"
    assert returns_to(PREFILL, DECODE, [Source(replace(PREFILL, role=Role.DECODE), 60)]) == (), "itself"


def test_each_prefill_peer_is_told_what_it_lacks():
    choice = chosen(workers=(DECODE, PREFILL, SECOND), held={"d0": 60, "p0": 40, "p1": 60})
    assert [peer.worker_id for peer in choice.prefill_peers] == ["p1", "p0"]
    assert choice.returns == {"p0": HOLDS}


def test_a_new_request_is_not_fetched_by_its_decode_worker():
    may = replace(LIMITS, local_prefill=True)
    assert not any(c.sources for c in chosen(workers=(OTHER, PREFILL), limits=may).candidates)
    again = replace(NEW, is_resumed=True)
    assert any(c.sources for c in chosen(workers=(OTHER, PREFILL), limits=may, request=again).candidates)


def test_its_record_gives_the_same_choice():
    choice = chosen()
    again = asked_from_json(json.loads(json.dumps(asked_to_json(choice.asked))))
    assert again == choice.asked
    assert choose(again.request, again.workers, again.held, again.limits, again.sources) == choice
    older = asked_to_json(choice.asked)
    del older["request"]["is_resumed"]
    assert asked_from_json(older).request.is_resumed, "older releases recorded sources for such requests only"


def test_a_holder_helps_if_a_prefill_worker_has_less():
    assert has_more(5, [7, 4])
    assert not has_more(5, [7, 5])
    assert not has_more(5, [])
