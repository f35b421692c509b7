"""One choice between engine and peers: which peer is asked, what is kept of a lost one, and that nothing runs on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from twostroke.core.clock import MonotonicClock
from twostroke.core.lease import HANDOVER_LEASE
from twostroke.core.request import CacheScope, Epoch, FinishReason, SamplingParams, SequenceKey
from twostroke.decode_worker.choice import TextDelta
from twostroke.decode_worker.order import Order, Peer
from twostroke.decode_worker.outbox import Outbox
from twostroke.decode_worker.pull import KvPullTools
from twostroke.decode_worker.task import DecodeTask
from twostroke.engine.facts import FaceFacts, ModelFacts
from twostroke.engine.link import messages as link
from twostroke.kv.codec import Codec
from twostroke.kv.handover.frames import decode_envelope, encode_message
from twostroke.kv.handover.machine import HandoverEnd, Label, Lost
from twostroke.kv.keys import PromptHasher
from twostroke.kv.recent_prompts import RecentPrompts
from twostroke.kv.spec import attention_spec
from twostroke.protos import common_pb2
from twostroke.protos import handover_pb2 as pb

SPEC, CLASS = attention_spec(2, 2, 16, Codec.FP8_E4M3), b"c" * 16
KEY, EPOCH, TOKENS = SequenceKey("r", 0), Epoch(1, 5), 72


class Clock(MonotonicClock):
    """It can be put forward."""

    ahead_s = 0.0

    def now_s(self) -> float:
        return super().now_s() + self.ahead_s


class Timer:
    def cancel(self) -> None: ...


class Peerage:
    """The decode side's end of a stream to one peer; the test is the peer."""

    def __init__(self, address: str) -> None:
        self.address, self.sequence, self.said = address, 0, []
        self.acts: list[Callable[[], None]] = []

    def now_s(self) -> float:
        return 1.0

    def after(self, delay_s: float, act: Callable[[], None]) -> Timer:
        if not delay_s:
            self.acts.append(act)
        return Timer()

    def listen(self, hear: Callable[[bytes | None], None]) -> None:
        self.hear = hear

    def send(self, envelope: bytes) -> None:
        message = decode_envelope(envelope)
        self.said.append(message.WhichOneof("body"))  # type: ignore[union-attr, call-overload]
        if self.said[-1] == "open":
            self.timeout_ms = message.open.timeout_ms  # type: ignore[union-attr]

    def close(self, *, now: bool) -> None:
        self.said.append("close")

    def trace(self, action: Any) -> None: ...

    def says(self, body: Any) -> None:
        while self.acts:
            self.acts.pop()()
        self.sequence += 1
        self.hear(encode_message(Label("r", 0, EPOCH).down(self.sequence, body)))


class Text:
    """A choice that any token ends: 5 by its text, others by their number."""

    num_tokens, num_shown, ended = 0, 0, None

    def push(self, first_index: int, token_ids: tuple[int, ...], logprobs: Any) -> TextDelta:
        is_by_text = token_ids == (5,)
        ended = FinishReason.STOP if is_by_text else FinishReason.LENGTH
        return TextDelta(first_index, token_ids, "x", ended, is_by_text)

    def flush(self) -> str:
        return ""


class Bench:
    def __init__(self, num_peers: int = 2, held_tokens: int = 0, *, confirm: int = 0) -> None:
        self.commands: list[Any] = []
        self.peers: list[Peerage] = []
        self.clock, self.outbox = Clock(), Outbox()
        model = ModelFacts("m", "", 100, 64, frozenset({1}), b"w" * 16, CLASS, "here", True, SPEC)
        self.facts = FaceFacts("d", model, PromptHasher(b"k" * 32, b"w" * 16, CLASS), 7, 10, 16, 8192, 4, 8, 64)
        self.journal = None
        self.pull = KvPullTools(self, None, 7, SPEC, HANDOVER_LEASE, self.clock, Counter())  # type: ignore[arg-type]
        peers = tuple(Peer(f"p{n}", 1, f"p{n}:1") for n in range(num_peers))
        params = SamplingParams(max_tokens=9)
        scope = CacheScope("t", b"")
        prompt = RecentPrompts(self.facts.namer).name(KEY.request_id, tuple(range(TOKENS)), scope)
        order = Order(KEY, EPOCH, prompt, params, scope, peers, 60.0, 0, 0, 1, confirm=confirm)
        self.run = DecodeTask(order, Text(), self.outbox, self, lambda _: None)  # type: ignore[arg-type]
        self.run.start()
        self.run.handle(link.Promised(order.engine_key, held_tokens))
        self.key = order.engine_key

    def connect(self, key: SequenceKey, address: str) -> Peerage:
        self.peers.append(Peerage(address))
        return self.peers[-1]

    def own(self, key: SequenceKey, owner: Any) -> None: ...

    def send(self, command: Any) -> None:
        self.commands.append(command)

    def sent(self, kind: type) -> list[Any]:
        return [command for command in self.commands if isinstance(command, kind)]


def lost(stored: int = 0, first_token: int | None = None, reason: HandoverEnd = HandoverEnd.CLOSED) -> Lost:
    return Lost(reason, stored, first_token)


@pytest.mark.parametrize(
    "reason", [HandoverEnd.FAILED, HandoverEnd.CLOSED, HandoverEnd.SILENT, HandoverEnd.PROTOCOL, HandoverEnd.CORRUPTED]
)
@pytest.mark.parametrize("held", [0, 16])
def test_the_next_peer_is_asked_where_nothing_came(held: int, reason: HandoverEnd) -> None:
    it = Bench(held_tokens=held)
    it.run.pull_lost(lost(held, reason=reason))
    assert [peer.address for peer in it.peers] == ["p0:1", "p1:1"]
    it.run.pull_lost(lost(held, reason=reason))
    assert it.sent(link.PrefillLocally) == [link.PrefillLocally(it.key, held, None)]


@pytest.mark.parametrize(("stored", "first_token"), [(32, None), (0, 7), (32, 7)])
def test_what_came_is_kept_and_the_rest_computed_here(stored: int, first_token: int | None) -> None:
    it = Bench()
    it.run.pull_lost(lost(stored, first_token))
    assert len(it.peers) == 1
    assert it.sent(link.PrefillLocally) == [link.PrefillLocally(it.key, stored, first_token)]


def test_a_request_that_ended_asks_nobody_and_computes_nothing() -> None:
    it = Bench()
    it.peers[0].says(pb.Started())
    it.run.cancel("nobody wants it")
    assert it.sent(link.CancelSequence) == [link.CancelSequence(it.key, FinishReason.CANCELLED)]
    assert it.peers[0].said[-2:] == ["cancel", "close"]
    it.run.pull_lost(lost())
    assert (len(it.peers), it.sent(link.PrefillLocally)) == (1, [])
    late = Bench()
    late.peers.clear()
    late.run.cancel("before the promise")
    late.run.handle(link.Promised(late.key, 0))
    assert late.peers == []


def test_room_that_a_lost_peer_asked_for_waits_for_the_next_one_to_ask() -> None:
    it = Bench()
    it.peers[0].says(pb.Started())
    it.run.handle(link.NotYet(it.key))
    it.peers[0].hear(None)
    assert len(it.peers) == 2
    it.run.handle(link.Bound(it.key))
    assert "bind" not in it.peers[1].said
    it.peers[1].says(pb.Started())
    assert it.peers[1].said == ["open", "bind"]
    assert len(it.sent(link.Bind)) == 1


@pytest.mark.parametrize("answer", [link.NotYet, link.Bound])
def test_an_answer_that_a_lost_peer_asked_for_reaches_the_next_one_once(answer: Any) -> None:
    it = Bench()
    it.peers[0].says(pb.Started())
    it.peers[0].hear(None)  # lost before the engine has answered
    it.peers[1].says(pb.Started())
    assert it.peers[1].said == ["open"]
    it.run.handle(answer(it.key))
    if answer is link.NotYet:
        assert it.peers[1].said == ["open", "not_yet"]
        it.run.handle(link.Bound(it.key))
    assert it.peers[1].said[-1] == "bind"
    assert len(it.sent(link.Bind)) == 1


def test_the_engine_knows_when_the_request_is_too_late() -> None:
    (submit,) = Bench().sent(link.Submit)
    assert 0 < submit.deadline_s - MonotonicClock().now_s() <= 60


def test_what_its_text_or_a_peers_token_ended_is_computed_no_further() -> None:
    it = Bench(num_peers=0)
    it.run.handle(link.TokenNews(it.key, 0, (5,)))
    assert it.sent(link.CancelSequence) == [link.CancelSequence(it.key, FinishReason.STOP)]
    knows = Bench(num_peers=0)
    knows.run.handle(link.TokenNews(knows.key, 0, (6,)))  # the engine counts too, and ends it
    assert knows.sent(link.CancelSequence) == []
    peer = Bench()
    peer.peers[0].says(pb.Started())
    peer.peers[0].says(pb.FirstToken(token_id=6))
    assert peer.sent(link.CancelSequence) == [link.CancelSequence(peer.key, FinishReason.LENGTH)]
    assert peer.peers[0].said[-2:] == ["cancel", "close"]


def test_the_end_of_a_sequence_ends_its_hand_over() -> None:
    it = Bench()
    it.peers[0].says(pb.Started())
    it.run.handle(link.Ended(it.key, FinishReason.ERROR, "deadline_exceeded", "late"))
    assert it.peers[0].said[-2:] == ["cancel", "close"]


def test_the_first_reason_to_end_stays() -> None:
    it = Bench(num_peers=0)
    it.run.handle(link.TokenNews(it.key, 0, (5,)))  # a stop string
    it.run.cancel("the client left")
    it.run.handle(link.Ended(it.key, FinishReason.CANCELLED))
    output = it.outbox.take()
    assert output is not None
    assert [end.reason for end in output.ends] == [common_pb2.FINISH_REASON_STOP]


def test_a_later_peer_gets_the_time_that_is_left() -> None:
    it = Bench()
    it.peers[0].says(pb.Started())
    it.clock.ahead_s = 20.0
    it.peers[0].hear(None)
    it.peers[1].says(pb.Started())
    assert [round(peer.timeout_ms / 1000) for peer in it.peers] == [60, 40]


def named(it: Bench) -> list[tuple[str, int]]:
    """Peers of which the router is told that they compute the prompt next."""
    output = it.outbox.take()
    if output is None:
        return []
    assert all((taken.request_id, taken.choice, taken.epoch.counter) == ("r", 0, 5) for taken in output.taken)
    return [(taken.peer.worker_id, taken.peer.incarnation) for taken in output.taken]


def test_the_router_of_a_suspect_hears_who_computes_its_prompt_before_that_one_may_begin() -> None:
    it = Bench(confirm=4)
    assert named(it) == [], "the first peer has it, and may have it in its queue"
    it.peers[0].says(pb.Started())
    assert (named(it), it.peers[0].said) == ([("p0", 1)], ["open"])
    it.run.handle(link.Bound(it.key))
    assert it.peers[0].said == ["open", "bind"]


def test_of_another_request_the_router_hears_of_later_peers_only() -> None:
    it = Bench()
    it.peers[0].says(pb.Started())
    assert named(it) == []
    it.peers[0].hear(None)
    assert named(it) == []
    it.peers[1].says(pb.Started())
    assert named(it) == [("p1", 1)]


def test_a_suspect_is_one_until_it_has_the_tokens_that_its_order_says() -> None:
    it = Bench(num_peers=0, confirm=2)
    assert it.run.is_suspect
    it.run.handle(link.TokenNews(it.key, 0, (6,)))
    assert it.run.is_suspect
    it.run.handle(link.TokenNews(it.key, 1, (6,)))
    assert not it.run.is_suspect
    assert not Bench(num_peers=0).run.is_suspect
