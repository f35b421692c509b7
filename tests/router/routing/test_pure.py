"""Properties of the router's pure parts that no single transcript shows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twostroke.core.errors import Overloaded
from twostroke.core.request import Epoch, FinishReason, Role, TokenLogprobs
from twostroke.kv.handover.pairing import why_refused
from twostroke.kv.spec import attention_spec
from twostroke.protos import common_pb2
from twostroke.router.requests.admission.bounds import Admission, AdmissionLimits, Offer
from twostroke.router.requests.delivery import Delivery, DeliveryVerdict, PieceBuffer
from twostroke.router.requests.history import RequestHistory
from twostroke.router.requests.pieces import OutputDelta
from twostroke.router.routing.candidates import PolicyLimits, RequestFacts, WorkerView
from twostroke.router.routing.coefficients import Coefficients
from twostroke.router.routing.facts import (
    GpuFacts,
    LoadFacts,
    ModelFacts,
    WorkerFacts,
    WorkerKey,
    WorkerState,
)
from twostroke.router.routing.fleet import Fleet
from twostroke.router.routing.known_worker import Worker
from twostroke.router.routing.policy import choose

messages = st.lists(
    st.tuples(st.sampled_from(["tokens", "end", "dispatch"]), st.integers(0, 2), st.integers(1, 4), st.integers(0, 6)),
    max_size=60,
)


@given(messages)
@settings(max_examples=200, deadline=None)
def test_whatever_arrives_the_stream_is_a_gapless_prefix_of_the_living_epochs(arriving) -> None:
    delivery, counter = Delivery(2), 1
    delivery.dispatch(Epoch(1, 1))
    delivered: list[list[tuple[int, int]]] = [[], []]  # (index, epoch) per choice
    ended: dict[int, int] = {}
    for what, choice, epoch, index in arriving:
        if what == "dispatch":
            if delivery.unfinished:
                counter += 1
                delivery.dispatch(Epoch(1, counter))
        elif what == "end":
            if delivery.end(choice, Epoch(1, epoch), FinishReason.STOP) is DeliveryVerdict.TAKE:
                assert choice not in ended
                assert epoch == counter
                ended[choice] = epoch
        elif delivery.tokens(choice, Epoch(1, epoch), index, [10 * epoch + index]) is DeliveryVerdict.TAKE:
            assert choice not in ended
            assert epoch == counter
            delivered[choice].append((index, epoch))
    for choice, tokens in enumerate(delivered):
        assert [index for index, _ in tokens] == list(range(delivery.tokens_of(choice)))
        assert list(delivery.ids_of(choice)) == [10 * epoch + index for index, epoch in tokens]
        assert [epoch for _, epoch in tokens] == sorted(epoch for _, epoch in tokens)


def test_what_comes_from_a_recalled_epoch_is_stale():
    """One choice is refused, the request goes elsewhere: the other choice's token, under way, must not pin it."""
    delivery = Delivery(2)
    delivery.dispatch(Epoch(1, 1))
    delivery.recall()
    assert delivery.tokens(0, Epoch(1, 1), 0, [9]) is DeliveryVerdict.STALE_EPOCH
    assert delivery.end(0, Epoch(1, 1), FinishReason.STOP) is DeliveryVerdict.STALE_EPOCH
    assert delivery.ids_of(0) == ()
    delivery.dispatch(Epoch(1, 2))
    assert delivery.tokens(0, Epoch(1, 2), 0, [9]) is DeliveryVerdict.TAKE


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 1), st.integers(1, 3)), max_size=60), st.integers(1, 5))
def test_a_full_buffer_merges_each_choice_with_itself_and_loses_nothing(acts, room) -> None:
    buffer, sent, got = PieceBuffer(room), ([], []), ([], [])

    def take() -> bool:
        piece = buffer.take()
        if piece is None:
            return False
        assert piece.first_index == len(got[piece.choice])
        assert piece.text == "xy"[piece.choice] * len(piece.token_ids)
        got[piece.choice].extend(piece.token_ids)
        return True

    for put, choice, count in acts:
        if put:
            first = len(sent[choice])
            ids = tuple(range(first, first + count))
            buffer.put(OutputDelta(choice, first, ids, "xy"[choice] * count), now_s=1.0)
            sent[choice].extend(ids)
            assert len(buffer) <= room + 1  # a choice of which nothing waits has a piece beyond
        else:
            take()
    assert (buffer.full_since_s is None) or len(buffer) >= room
    while take():
        pass
    assert got == sent


@given(
    st.lists(
        st.tuples(st.sampled_from(["offer", "release", "cancel", "reject"]), st.integers(0, 8), st.integers(1, 400)),
        max_size=80,
    )
)
def test_offered_is_accepted_and_rejected_and_cancelled_and_bounds_hold(acts) -> None:
    limits = AdmissionLimits(max_requests=4, max_tokens=1000)
    admission = Admission(limits)
    under_way: dict[str, int] = {}
    for now_s, (act, number, tokens) in enumerate(acts):
        name = f"r{number}"
        if act == "offer" and name not in under_way:
            advice_s = refused(admission, Offer(name, f"t{number % 3}", tokens, 5.0), float(now_s))
            if advice_s is None:
                under_way[name] = tokens
            else:
                assert limits.first_retry_s <= advice_s <= limits.longest_retry_s
        elif act != "offer":
            under_way.pop(name, None)
            if act == "reject":
                admission.reject(name, float(now_s))
            else:
                admission.release(name, float(now_s), cancelled=act == "cancel")
        assert admission.offered == admission.accepted + admission.rejected + admission.cancelled
        assert admission.tokens == sum(under_way.values()) <= limits.max_tokens
        assert len(admission) == len(under_way) <= limits.max_requests


def refused(admission: Admission, offer: Offer, now_s: float) -> float | None:
    try:
        admission.offer(offer, now_s)
    except Overloaded as error:
        return error.retry_after_s or 0.0
    return None


workers = st.lists(
    st.builds(
        WorkerView,
        key=st.just(WorkerKey("?", 1)),
        address=st.just("a"),
        role=st.sampled_from(list(Role)),
        numerics=st.sampled_from([b"x", b"x", b"y"]),
        capabilities=st.sampled_from([(), ("handover.grpc.1", "kv.read.fp8"), ("handover.grpc.1", "kv.read.float32")]),
        kv_spec=st.sampled_from([None, attention_spec(2, 4, 16, 1), attention_spec(2, 4, 16, 3)]),
        num_ranks=st.sampled_from([1, 2, 4]),
        coefficients=st.builds(Coefficients, st.floats(0.01, 5), st.floats(0, 1e-3), st.floats(1, 100)),
        kv_bytes_per_token=st.just(1000),
        queued_prefill_tokens=st.integers(0, 50_000),
        queued_prefill_pairs=st.floats(0, 1e9),
        num_decoding=st.integers(0, 64),
        max_num_seqs=st.integers(1, 64),
        free_kv_tokens=st.integers(0, 100_000),
        in_flight=st.integers(0, 64),
    ),
    max_size=8,
)


@given(workers, st.integers(1, 4000), st.lists(st.integers(0, 300), min_size=8, max_size=8), st.booleans())
@settings(max_examples=150, deadline=None)
def test_the_winner_is_cheapest_within_the_noise_and_can_do_the_work(views, prompt, blocks, local) -> None:
    views = [replaced(view, number) for number, view in enumerate(views)]
    held = {f"w{number}": count for number, count in enumerate(blocks)}
    limits = PolicyLimits(local_prefill=local)
    choice = choose(RequestFacts("r", prompt, 100), views, held, limits)
    if choice is None:
        assert all(view.role is Role.PREFILL for view in views)
        return
    asked = choice.asked
    assert asked is not None
    assert choose(asked.request, asked.workers, asked.held, asked.limits) == choice
    assert asked.held == held
    best_ms = min(c.terms.total_ms for c in choice.candidates)
    noise_ms = max(limits.equal_ms, limits.equal_share * best_ms)
    assert choice.winner.terms.total_ms <= best_ms + noise_ms
    assert choice.winner.decode.role is not Role.PREFILL
    assert len({peer.key for peer in choice.prefill_peers}) == len(choice.prefill_peers)
    for candidate in choice.candidates:
        terms = candidate.terms
        assert min(terms.prefill_queue_ms, terms.transfer_ms, terms.decode_queue_ms, terms.load_penalty_ms) >= 0
        assert terms.prefill_ms > 0  # the last token is always computed
        assert candidate.prefill is None or why_refused(candidate.prefill, candidate.decode) is None
    known = {view.worker_id: view for view in views}
    for pair in choice.refused:
        assert why_refused(known[pair.prefill], known[pair.decode]).message == pair.reason
    assert choice == choose(RequestFacts("r", prompt, 100), views, held, limits)


def replaced(view: WorkerView, number: int) -> WorkerView:
    from dataclasses import replace

    return replace(view, key=WorkerKey(f"w{number}", 1))


def test_the_journal_is_bounded_and_survives_a_full_disk(tmp_path: Path) -> None:
    journal = RequestHistory(max_entries=3)
    for number in range(5):
        journal.add({"tenant": "t", "request_id": f"r{number}"})
    assert len(journal) == 3
    assert journal.find("t", "r1") is None
    assert journal.find("t", "r4") == {"tenant": "t", "request_id": "r4"}
    assert journal.find("u", "r4") is None
    full = RequestHistory(Path("/dev/full"))
    full.add({"tenant": "t", "request_id": "r"})
    full.add({"tenant": "t", "request_id": "s"})
    full.close()
    assert full.num_lost_lines == 2
    assert full.find("t", "s") is not None


def test_the_journals_file_is_for_us_alone(tmp_path: Path) -> None:
    path = tmp_path / "decisions.jsonl"
    journal = RequestHistory(path)
    journal.add({"tenant": "t", "request_id": "r"})
    journal.close()
    assert path.stat().st_mode & 0o077 == 0


def test_the_journals_file_is_rotated(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    journal = RequestHistory(path, max_file_bytes=100)
    for number in range(10):
        journal.add({"tenant": "t", "request_id": f"r{number}"})
    journal.close()
    assert sum(p.stat().st_size for p in tmp_path.iterdir()) < 300
    assert {p.name for p in tmp_path.iterdir()} <= {"log.jsonl", "log.jsonl.1"}


def test_merged_pieces_keep_every_logprob_and_the_latest_count_of_shown_tokens():
    one, two = (TokenLogprobs(i, -1.0, 1, ()) for i in (1, 2))
    scored = common_pb2.TokenLogprobs(token_id=2)
    buffer = PieceBuffer(1)
    buffer.put(OutputDelta(0, 0, (1,), "a", logprobs=(one,), prompt_scores=(scored,), num_shown=1), now_s=0.0)
    buffer.put(OutputDelta(0, 1, (2,), "b", logprobs=(two,), num_shown=2), now_s=0.0)
    merged = buffer.take()
    assert merged is not None
    assert (merged.token_ids, merged.logprobs, merged.prompt_scores, merged.num_shown) == (
        (1, 2),
        (one, two),
        (scored,),
        2,
    )


@pytest.mark.parametrize("lengths", [(4096, 1024), (1024, 4096)])
def test_a_model_has_the_context_that_each_of_its_workers_can_hold(lengths: tuple[int, int]) -> None:
    fleet = Fleet()
    for number, length in enumerate(lengths):
        model = ModelFacts("m", b"f" * 16, b"n", "", length, 1000, True, "", 1000)
        facts = WorkerFacts(f"w{number}", 1, Role.COMBINED, "w:1", model, 64, 16, 8, 64)
        fleet.announced(facts, 0.0)
        fleet.session_up(facts.key, facts, 0.0)
    assert fleet.models()["m"].max_model_len == 1024
    assert fleet.ready_models()["m"].max_model_len == 1024


@pytest.mark.parametrize("way", ["announced", "welcome", "report"])
def test_a_role_follows_the_last_word_on_any_stream(way: str) -> None:
    fleet, model = Fleet(), ModelFacts("m", b"f", b"n", "", 1024, 256, True, "", 1)
    facts = WorkerFacts("w", 1, Role.DECODE, "w:1", model, 64, 16, 8, 64)
    fleet.announced(facts, 0.0)
    fleet.session_up(facts.key, facts, 0.0)
    worker = fleet.get("w")
    assert worker is not None
    for role in (Role.PREFILL, Role.COMBINED, Role.DECODE):
        if way == "announced":
            fleet.announced(replace(facts, role=role), 1.0)
        elif way == "welcome":
            fleet.session_up(facts.key, replace(facts, role=role), 1.0)
        else:
            fleet.loaded(facts.key, LoadFacts(), role, 1.0)
        assert worker.role is role
        decodes = role is not Role.PREFILL
        assert fleet.may_serve_soon("m") == decodes
        assert ("m" in fleet.ready_models()) == decodes
        assert "m" in fleet.models()


def test_a_session_that_is_open_again_counts_as_heard_now() -> None:
    fleet, model = Fleet(), ModelFacts("m", b"f", b"n", "", 1024, 256, True, "", 1)
    facts = WorkerFacts("w", 1, Role.DECODE, "w:1", model, 64, 16, 8, 64)
    fleet.announced(facts, 0.0)
    fleet.session_up(facts.key, facts, 0.0)
    fleet.beat(facts.key, 0.0, "step", 1)
    for place in range(1, 199):
        now_s = place / 10
        fleet.announced(facts, now_s)
        fleet.beat(facts.key, now_s, "step", 1) if now_s < 18.0 else None
        fleet.tick(now_s)
    assert [worker.state for worker in fleet] == [WorkerState.SUSPECT], "its count of steps stands still"
    fleet.session_down(facts.key, 20.0, "broke")
    fleet.session_up(facts.key, facts, 20.1)
    assert [worker.state for worker in fleet] == [WorkerState.LIVE]
    assert fleet.tick(20.2) == []
    assert [worker.state for worker in fleet] == [WorkerState.LIVE]


@pytest.mark.parametrize(
    ("reported", "counted"),
    [(3.0, 3.0), (0.0, 1.0), (-5.0, 1.0), (float("nan"), 1.0), (float("inf"), 100.0), (1e9, 100.0)],
)
def test_a_reported_slowdown_counts_within_bounds(reported: float, counted: float) -> None:
    model = ModelFacts("m", b"f" * 16, b"n" * 16, "", 4096, 1000, True, "", 1000)
    worker = Worker(WorkerFacts("w", 1, Role.DECODE, "w:1", model, 10, 16, 4, 512), 0.0, 0.0)
    assert worker.slowdown == 1.0
    gpus = (GpuFacts("GPU-a", verdict="throttled", slowdown=reported), GpuFacts("GPU-b", slowdown=50.0))
    worker.load = LoadFacts(gpus=gpus)
    assert worker.slowdown == counted
