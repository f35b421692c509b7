"""The pure parts of the journal by properties: no cursor forks a stream, bounds hold, what is read back is a prefix."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twostroke.core.errors import CursorLost, IdempotencyKeyReused, InvalidRequest, Unavailable
from twostroke.core.request import FinishReason, Request, SamplingParams, TokenLogprobs
from twostroke.router.journal.cursor import Track, parse_cursor
from twostroke.router.journal.journal import Asked, Entry, Journal, JournalLimits, check_same
from twostroke.router.journal.merged import merged
from twostroke.router.journal.sealed import Sealer
from twostroke.router.journal.stored import batch_of, read_back
from twostroke.router.requests.pieces import OutputDelta, TokenUsage


def asked(name: str = "r", tenant: str = "t", **more: Any) -> Asked:
    request = Request(name, "m", (1, 2, 3), SamplingParams(8, seed=5, stop=("x",)), 2, "d", 60.0, tenant=tenant)
    return Asked(request, "text_completion", {"stream": True}, 7, **more)


@st.composite
def streams(draw: Any) -> list[OutputDelta]:
    """A whole stream of two choices, in any order of their pieces."""
    lengths = [draw(st.integers(0, 6)) for _ in range(2)]
    waiting, pieces = [0, 0], []
    order = draw(st.permutations([0] * (lengths[0] + 1) + [1] * (lengths[1] + 1)))
    for choice in order:
        index = waiting[choice]
        waiting[choice] += 1
        if index < lengths[choice]:
            pieces.append(OutputDelta(choice, index, (draw(st.integers(0, 3)),), f"{choice}.{index} "))
        else:
            pieces.append(OutputDelta(choice, index, (), "!", FinishReason.LENGTH))
    last = pieces[-1]
    pieces[-1] = OutputDelta(
        last.choice, last.first_index, (), "!", FinishReason.LENGTH, TokenUsage(3, sum(lengths), 0)
    )
    return pieces


def told(pieces: list[OutputDelta], cursor: str) -> list[OutputDelta]:
    """What a client with this cursor gets of a stream."""
    track = Track(2, parse_cursor(cursor, 2, "cursor"))
    new, held = [], []
    for piece in pieces:
        held += [part for part in track.parts(piece) if track.take(part)]
        if track.is_confirmed:
            new += held
            held = []
    assert not held, "nothing is held back at the end"
    return new


@given(streams(), st.data())
def test_a_cursor_splits_a_stream_in_what_was_had_and_the_rest(pieces: list[OutputDelta], data: Any):
    split = data.draw(st.integers(0, len(pieces)))
    track = Track(2)
    assert all(track.take(piece) for piece in pieces[:split])
    assert told(pieces, track.cursor) == pieces[split:]


@given(streams(), st.data())
def test_a_stream_that_is_packed_otherwise_goes_on_at_the_same_token_and_character(
    pieces: list[OutputDelta], data: Any
):
    track = Track(2)
    had = pieces[: data.draw(st.integers(0, len(pieces)))]
    for piece in had:
        track.take(piece)
    packed: list[OutputDelta] = []
    for choice in (0, 1):
        of_it = [piece for piece in pieces if piece.choice == choice]
        while of_it:
            num = data.draw(st.integers(1, len(of_it)))
            some, of_it = of_it[:num], of_it[num:]
            ids = tuple(t for piece in some for t in piece.token_ids)
            text, last = "".join(piece.text for piece in some), some[-1]
            packed.append(OutputDelta(choice, some[0].first_index, ids, text, last.finish_reason, last.usage))
    rest = told(packed, track.cursor)
    for choice in (0, 1):
        joined = [piece for piece in had + rest if piece.choice == choice]
        whole = [piece for piece in pieces if piece.choice == choice]
        assert [t for piece in joined for t in piece.token_ids] == [t for piece in whole for t in piece.token_ids]
        assert "".join(piece.text for piece in joined) == "".join(piece.text for piece in whole)
        assert [piece.finish_reason for piece in joined if piece.finish_reason] == [FinishReason.LENGTH]
        places = [piece.first_index for piece in joined if piece.token_ids]
        assert places == [sum(len(piece.token_ids) for piece in joined[:n]) for n in range(len(places))]


@given(streams(), streams(), st.data())
def test_a_cursor_of_another_stream_ends_in_an_error_or_continues_the_same_tokens(
    one: list[OutputDelta], other: list[OutputDelta], data: Any
):
    had = one[: data.draw(st.integers(0, len(one)))]
    track = Track(2)
    for piece in had:
        track.take(piece)
    try:
        rest = told(other, track.cursor)
    except CursorLost:
        return
    for choice in (0, 1):
        joined = [t for piece in had + rest if piece.choice == choice for t in piece.token_ids]
        assert joined == [t for piece in other if piece.choice == choice for t in piece.token_ids]


def test_an_end_that_came_with_tokens_its_client_has_is_not_given_out_with_their_text_again():
    track = Track(1)
    track.take(OutputDelta(0, 0, (5,), "five "))
    track.take(OutputDelta(0, 1, (6,), "six "))
    without_chars = track.cursor.replace("~9", "")  # so the piece cannot be split
    again = Track(1, parse_cursor(without_chars, 1, "cursor"))
    again.take(OutputDelta(0, 0, (5,), "five "))
    (piece,) = again.parts(OutputDelta(0, 1, (6,), "six !", FinishReason.STOP))
    with pytest.raises(CursorLost):
        again.take(piece)


def test_the_first_part_of_a_split_piece_says_nothing_of_the_rest():
    track = Track(1, parse_cursor(f"1~2-{_digest(5)}", 1, "cursor"))
    usage = TokenUsage(3, 2, 0)
    first, rest = track.parts(OutputDelta(0, 0, (5, 6), "a b ", FinishReason.LENGTH, usage, num_shown=2))
    assert (first.token_ids, first.text, first.finish_reason, first.usage, first.num_shown) == (
        (5,),
        "a ",
        None,
        None,
        1,
    )
    assert (rest.token_ids, rest.text, rest.usage, rest.num_shown) == ((6,), "b ", usage, 2)
    assert [track.take(part) for part in (first, rest)] == [False, True]


def _digest(*ids: int) -> str:
    track = Track(1)
    track.take(OutputDelta(0, 0, ids, ""))
    return track.cursor.partition("-")[2]


@given(st.text(max_size=40))
def test_any_text_is_a_cursor_or_a_typed_error(text: str):
    try:
        marks = parse_cursor(text, 2, "cursor")
    except InvalidRequest:
        return
    assert parse_cursor(".".join(map(str, marks)), 2, "cursor") == marks


LIMITS = JournalLimits(max_requests=3, max_bytes=20_000, keep_s=10.0, grace_s=2.0)


@given(
    st.lists(st.tuples(st.sampled_from(["add", "put", "end", "read", "leave", "tick"]), st.integers(0, 5)), max_size=60)
)
def test_bounds_hold_whatever_happens(events: list[tuple[str, int]]):
    journal, entries, readers, now_s = Journal(LIMITS), dict[int, Entry](), dict[int, int](), 0.0
    for what, number in events:
        now_s += 0.7
        entry = entries.get(number)
        if what == "add" and (entry is None or entry.is_over):
            entries[number] = journal.add(asked(f"r{number}", key=f"k{number}"), now_s)
            readers[number] = 0
        elif what == "put" and entry is not None and not entry.is_over:
            journal.put(entry, OutputDelta(0, len(entry.pieces), (1,), "x" * 1000))
        elif what == "end" and entry is not None:
            journal.end(entry, None, now_s)
        elif what == "read" and entry is not None:
            journal.attach(entry)
            readers[number] += 1
        elif what == "leave" and entry is not None and readers[number]:
            journal.detach(entry, now_s)
            readers[number] -= 1
        elif what == "tick":
            for late in journal.tick(now_s):
                assert late.num_readers == 0
                assert not late.is_over
        kept = [entry for entry in entries.values() if journal.is_kept(entry)]
        assert len(kept) == len(journal) <= 3
        assert journal.num_bytes == sum(entry.size_bytes for entry in kept) <= 20_000
        for index, entry in entries.items():
            assert (journal.find("t", f"r{index}") is entry) == journal.is_kept(entry)
            assert (journal.find_key("t", f"k{index}") is entry) == journal.is_kept(entry)
            assert journal.find("other", f"r{index}") is None


def test_what_failed_before_its_first_piece_leaves_its_key():
    journal = Journal()
    entry = journal.add(asked(key="k"), 0.0)
    journal.end(entry, Unavailable("no", retry_after_s=1.0), 1.0)
    assert journal.find_key("t", "k") is None
    journal.add(asked(key="k"), 2.0)
    with pytest.raises(InvalidRequest, match="in use"):
        journal.add(asked(), 3.0)
    with pytest.raises(IdempotencyKeyReused):
        check_same(b"one", b"other")


def test_a_forgotten_request_leaves_the_key_to_the_later_one_that_has_it():
    journal = Journal(LIMITS)
    early = journal.add(asked("r1", key="k"), 0.0)
    later = journal.add(asked("r2", key="k"), 1.0)  # two posts at the same instant
    journal.end(early, None, 1.0)
    journal.forget(early)
    assert journal.find_key("t", "k") is later


def test_over_a_bound_what_is_over_is_forgotten_first_then_the_oldest():
    journal = Journal(LIMITS)
    one, two, three = (journal.add(asked(f"r{number}"), 0.0) for number in range(3))
    journal.end(two, None, 1.0)
    four = journal.add(asked("r4"), 2.0)
    assert [journal.is_kept(entry) for entry in (one, two, three, four)] == [True, False, True, True]
    five = journal.add(asked("r5"), 3.0)
    assert [journal.is_kept(entry) for entry in (one, three, four, five)] == [False, True, True, True]


def test_a_tenant_that_keeps_most_loses_first():
    journal = Journal(LIMITS)
    for number in range(3):
        one = journal.add(asked(f"r{number}", tenant="few" if number == 0 else "many"), 0.0)
        journal.end(one, None, 0.5)
    journal.add(asked("r4", tenant="third"), 1.0)
    assert journal.find("few", "r0") is not None, "the oldest of all, of a tenant that keeps less"
    assert journal.find("many", "r1") is None
    assert journal.find("many", "r2") is not None


def response(name: str = "r", *, background: bool = True) -> Asked:
    return replace(asked(name), face="response", body={"background": background, "items": "x" * 5000})


def test_a_response_is_kept_longer_and_in_the_background_it_needs_no_reader():
    journal = Journal(replace(LIMITS, keep_responses_s=50.0))
    alone, left = journal.add(response("r1"), 0.0), journal.add(response("r2", background=False), 0.0)
    assert alone.size_bytes > 5000, "the text of its body counts as it is"
    assert journal.tick(5.0) == [left]
    for entry in (alone, left):
        journal.put(entry, OutputDelta(0, 0, (1,), "a"))
        journal.end(entry, None, 10.0)
    journal.tick(60.0)
    assert len(journal) == 2
    journal.tick(60.1)
    assert len(journal) == 0


def test_a_response_in_the_background_is_kept_as_failed_and_others_are_not():
    journal = Journal(LIMITS)
    late = Unavailable("no", retry_after_s=1.0)
    for is_alone in (True, False):
        entry = journal.add(response(background=is_alone), 0.0)
        journal.end(entry, late, 1.0)
        assert journal.is_kept(entry) is is_alone
        journal.forget(entry)
    assert journal.num_bytes == 0
    assert not journal._bytes, "nothing is left of a tenant without requests"


def test_pieces_of_an_adopted_request_are_proven_by_its_store_and_by_its_readers():
    journal = Journal(LIMITS)
    entry = journal.add(response(), 0.0)
    assert entry.num_proven is None
    entry.num_had = 3
    assert entry.num_proven == 3
    entry.num_read = 5
    assert entry.num_proven == 5


@given(streams())
def test_merged_pieces_of_one_choice_are_one_piece(pieces: list[OutputDelta]):
    one = [piece for piece in pieces if piece.choice == 0]
    (whole,) = merged(one)
    assert whole.text == "".join(piece.text for piece in one)
    assert whole.token_ids == tuple(token for piece in one for token in piece.token_ids)
    assert (whole.finish_reason, whole.usage, whole.first_index) == (one[-1].finish_reason, one[-1].usage, 0)
    assert merged(pieces) == pieces, "several choices stay as they are"
    scored = replace(one[0], logprobs=(TokenLogprobs(1, -1.0, 1, ()),))
    assert merged([scored, *one[1:]]) == [scored, *one[1:]]


def test_a_request_is_kept_for_its_time_and_running_ones_for_their_grace():
    journal = Journal(LIMITS)
    entry = journal.add(asked(), 0.0)
    journal.attach(entry)
    assert journal.tick(100.0) == []
    journal.detach(entry, 100.0)
    assert journal.tick(102.0) == []
    assert journal.tick(102.1) == [entry]
    journal.put(entry, OutputDelta(0, 0, (1,), "a"))
    journal.end(entry, None, 103.0)
    journal.tick(113.0)
    assert journal.is_kept(entry)
    journal.tick(113.1)
    assert not journal.is_kept(entry)


@given(streams(), st.data())
def test_what_is_read_back_is_a_prefix_whatever_is_missing_or_damaged(pieces: list[OutputDelta], data: Any):
    entry = Entry(asked(), 0.0)
    batches, written = [], 0
    for piece in pieces:
        entry.pieces.append(piece)
        if data.draw(st.booleans()):
            batch = batch_of(entry, written)
            batches.append(batch.SerializeToString())
            if data.draw(st.booleans()):  # else it is written once more, as after a lost answer
                written = batch.first + len(batch.items)
    entry.ended_s = 1.0
    batches.append(batch_of(entry, written).SerializeToString())
    whole = read_back(batches, "t", "r")
    assert whole is not None
    assert (whole.asked, whole.pieces, whole.is_over) == (entry.asked, pieces, True)
    assert read_back(batches, "t2", "r") is read_back(batches, "t", "r2") is None
    place = data.draw(st.integers(0, len(batches) - 1))
    damaged = data.draw(st.sampled_from([None, b"", b"\xff\xff", b"\x08\x01", data.draw(st.binary(max_size=30))]))
    less = batches[:place] + ([] if damaged is None else [damaged]) + batches[place + 1 :]
    found = read_back(less, "t", "r")
    assert found is None or found.pieces == pieces[: len(found.pieces)]


@given(st.binary(max_size=60), st.binary(max_size=60))
def test_a_sealed_value_opens_at_its_place_alone(value: bytes, noise: bytes):
    sealer, other = Sealer(b"k" * 32), Sealer(b"o" * 32)
    place = sealer.place("t", "r")
    sealed = sealer.seal(value, place)
    assert sealer.open(sealed, place) == value
    assert sealer.open(sealed, sealer.place("t", "r2")) is None
    assert other.open(sealed, place) is None
    assert sealer.open(sealed[:-1], place) is None
    assert sealer.open(noise, place) is None
    assert sealer.place("ab", "c") != sealer.place("a", "bc")
