"""Fetches as candidates: a request that goes on elsewhere may take the blocks of a worker that takes no new work."""

import json
from dataclasses import replace

from twostroke.core.request import Role
from twostroke.kv.spec import attention_spec
from twostroke.router.routing.candidates import PolicyLimits, RequestFacts, Source, WorkerView
from twostroke.router.routing.coefficients import Coefficients
from twostroke.router.routing.costs import MOST_LEFT_TOKENS
from twostroke.router.routing.facts import WorkerKey
from twostroke.router.routing.policy import choose, sources_for
from twostroke.router.routing.recorded import asked_from_json, asked_to_json

VIEW = WorkerView(
    key=WorkerKey("d0", 1),
    address="h:1",
    role=Role.DECODE,
    numerics=b"x",
    capabilities=(),
    kv_spec=attention_spec(2, 4, 16, 1),
    num_ranks=1,
    coefficients=Coefficients(1.0, 0.0, 10.0, 1e9),
    kv_bytes_per_token=1_000_000,
    queued_prefill_tokens=0,
    queued_prefill_pairs=0.0,
    num_decoding=0,
    max_num_seqs=64,
    free_kv_tokens=100_000,
    in_flight=0,
)
HEIR = replace(VIEW, key=WorkerKey("d1", 1))
PREFILL = replace(VIEW, key=WorkerKey("p0", 1), role=Role.PREFILL)
LIMITS = PolicyLimits()
DRAINED = (Source(VIEW, 60),)


def chosen(prompt=1000, workers=(HEIR,), held=None, limits=LIMITS, sources=DRAINED):
    choice = choose(RequestFacts("r", prompt, 100), workers, held or {}, limits, sources)
    assert choice is not None
    return choice


def test_blocks_of_a_draining_worker_are_fetched_where_computing_them_takes_longer():
    winner = chosen().winner
    assert [source.view.worker_id for source in winner.sources] == ["d0"]
    assert (winner.name, winner.computes, winner.prefill) == ("d0 >> d1", HEIR, None)
    assert (winner.prefill_held_tokens, winner.decode_held_tokens) == (960, 0)
    assert winner.terms.fetch_ms == LIMITS.handover_fixed_ms + 960.0
    assert winner.terms.prefill_ms == 40.0
    assert winner.terms.first_token_ms == winner.terms.fetch_ms + 40.0
    slow = replace(HEIR, coefficients=replace(HEIR.coefficients, handover_bytes_per_s=1e8))
    assert chosen(workers=[slow]).winner.sources == ()
    assert "blocks fetched from d0" in chosen().reason


def test_only_what_is_missing_is_counted():
    terms = chosen(held={"d1": 50}).winner.terms
    assert terms.fetch_ms == LIMITS.handover_fixed_ms + 160.0
    assert not any(c.sources for c in chosen(held={"d1": 60}).candidates), "there is nothing to gain"
    assert not any(c.sources for c in chosen(sources=()).candidates)


def test_the_last_token_is_always_computed():
    assert chosen(prompt=960).winner.prefill_held_tokens == 944


def test_a_worker_is_no_source_of_itself_nor_of_one_that_cannot_read_it():
    strange = replace(VIEW, key=WorkerKey("d2", 1), numerics=b"y")
    more = replace(VIEW, key=WorkerKey("d3", 1))
    sources = [Source(HEIR, 62), Source(strange, 62), Source(VIEW, 60), Source(more, 61), Source(PREFILL, 10)]
    assert [source.view.worker_id for source in sources_for(HEIR, sources)] == ["d3", "d0"]


def test_a_decode_worker_that_must_not_prefill_fetches_if_little_is_left():
    limits = PolicyLimits(local_prefill=False)
    workers = [HEIR, PREFILL]
    enough = -(-(1000 - MOST_LEFT_TOKENS) // 16)
    assert chosen(workers=workers, limits=limits, sources=[Source(VIEW, enough)]).winner.sources
    less = chosen(workers=workers, limits=limits, sources=[Source(VIEW, enough - 1)])
    assert not any(candidate.sources for candidate in less.candidates)
    peers = chosen(workers=workers, limits=limits, sources=[Source(VIEW, enough)]).prefill_peers
    assert [peer.worker_id for peer in peers] == ["p0"], "it computes what the fetch does not bring"


def test_a_local_prefill_alone_has_no_peers():
    assert chosen(workers=[HEIR], sources=()).prefill_peers == ()


def test_its_record_gives_the_same_choice():
    choice = chosen(workers=[HEIR, PREFILL])
    again = asked_from_json(json.loads(json.dumps(asked_to_json(choice.asked))))
    assert again == choice.asked
    assert choose(again.request, again.workers, again.held, again.limits, again.sources) == choice
    older = asked_to_json(choice.asked)
    del older["sources"]
    assert asked_from_json(older).sources == ()


def test_other_requests_wait_for_the_prefill_that_a_fetch_leaves():
    busy = replace(HEIR, num_decoding=4)
    terms = chosen(workers=[busy]).winner.terms
    assert terms.load_penalty_ms == 0.5 * 10 * 4 + (0.2 + 0.5 * 5) * 40.0
