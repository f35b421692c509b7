"""What is remembered of ended requests: bounded in bytes, and in what each shows."""

import json
import threading
from pathlib import Path

import pytest
from support.clusters.flow_cluster import PROMPT, cluster, collect, request
from support.fakes.fake_worker import Behaviour, FakeWorker

from twostroke.core.errors import ContextLengthExceeded, InvalidRequest
from twostroke.core.request import Request, Role, SamplingParams
from twostroke.core.timeline import Instant, Timeline
from twostroke.router.api.batch import CHOICES_AT_ONCE
from twostroke.router.api.frontend import Frontend
from twostroke.router.requests import decision_log
from twostroke.router.requests import history as journal
from twostroke.router.requests.decision_log import DecisionLog
from twostroke.router.requests.explain import explain_sampling
from twostroke.router.requests.history import RequestHistory
from twostroke.router.requests.life import life_of
from twostroke.router.requests.state import RequestState
from twostroke.router.routing.facts import ModelFacts

HEAVY = SamplingParams(
    max_tokens=5,
    stop=("\U0001f600" * 256,) * 16,
    stop_token_ids=tuple(range(256)),
    logit_bias=tuple((n, 1.0) for n in range(1024)),
    bad_words=(tuple(range(1000)),) * 260,
)


def test_long_lists_are_shown_by_their_length_and_texts_are_cut():
    shown = explain_sampling(HEAVY)
    assert shown["bad_words"] == "260 words"
    assert shown["logit_bias"] == "1024 entries"
    assert shown["stop_token_ids"] == "256 token ids"
    assert shown["stop"] == ["\U0001f600" * 64 + "..."] * 16
    assert len(json.dumps(shown)) < 16 << 10
    short = SamplingParams(max_tokens=5, stop=("a",), stop_token_ids=(7,), logit_bias=((3, 1.0),), bad_words=((1, 2),))
    shown = explain_sampling(short)
    assert (shown["stop"], shown["stop_token_ids"]) == (["a"], [7])
    assert (shown["logit_bias"], shown["bad_words"], shown["max_tokens"]) == ([(3, 1.0)], [(1, 2)], 5)
    assert set(shown) == set(SamplingParams.__slots__)


async def test_running_and_ended_requests_show_the_same_bounded_sampling():
    async with cluster() as c:
        await c.add(FakeWorker("w", behaviour=Behaviour(stop_after=2)))
        asked = Request("r", "tiny", PROMPT, HEAVY, 1, "t", 20.0)
        stream = c.flow.generate(asked, Timeline())
        await anext(stream)
        running = c.flow.explain("t", "r")
        await stream.aclose()
        ended = c.flow.explain("t", "r")
    assert running is not None
    assert ended is not None
    assert running["state"] == "running"
    assert running["sampling"]["bad_words"] == ended["sampling"]["bad_words"] == "260 words"


def test_entries_are_bounded_in_all_and_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "MAX_ENTRY_BYTES", 1000)
    kept = RequestHistory(max_bytes=5_000)
    for number in range(20):
        kept.add({"request_id": f"r{number}", "tenant": "t", "small": 1, "long": "x" * 800})
    assert kept.num_bytes <= 5_000
    assert len(kept) == 5
    assert kept.find("t", "r14") is None
    kept.add({"request_id": "r19", "tenant": "t", "small": 2, "long": ["y"] * 100_000, "second": "z" * 700})
    assert kept.find("t", "r19") == {
        "request_id": "r19",
        "tenant": "t",
        "small": 2,
        "long": "left out: 400001 bytes",
        "second": "z" * 700,
    }
    for number in range(20):
        kept.add({"request_id": f"s{number}", "tenant": "t"})
    assert len(kept) == 25
    assert kept.num_bytes == sum(len(json.dumps(kept.find(*key), separators=(",", ":"))) for key in kept._entries)


def test_a_disk_that_fails_once_loses_a_line_and_the_file_is_opened_anew(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path / "log")
    log._write("0")
    first = log._file
    assert first is not None
    first.close()
    first.write = lambda _: (_ for _ in ()).throw(OSError("no space"))  # type: ignore[method-assign]
    log._write("1")
    log._write("2")
    assert log.num_lost_lines == 1
    assert log._file is not first
    log.close()
    assert (tmp_path / "log").read_text().split() == ["0", "2"]


def test_a_disk_that_hangs_costs_lines_and_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decision_log, "MAX_WAITING_LINES", 3)
    hangs, began = threading.Event(), threading.Event()
    write = DecisionLog._write

    def slow(self: DecisionLog, line: str) -> None:
        began.set()
        hangs.wait(10)
        write(self, line)

    monkeypatch.setattr(DecisionLog, "_write", slow)
    log = DecisionLog(tmp_path / "log")
    log.add("0")
    began.wait(10)
    for number in range(1, 6):
        log.add(str(number))
    assert log.num_lost_lines == 2
    hangs.set()
    log.close()
    assert (tmp_path / "log").read_text().split() == ["0", "1", "2", "3"]


# ---------------------------------------------------------------- what fits


async def test_a_request_is_judged_by_the_workers_that_would_hold_it():
    async with cluster() as c:
        await c.add(FakeWorker("p", role=Role.PREFILL, kv_blocks=1000), FakeWorker("d", Role.DECODE, kv_blocks=10))
        with pytest.raises(ContextLengthExceeded, match="at most 160 fit"):
            await collect(c.flow, request("r1", max_tokens=100))


def test_a_list_is_judged_by_what_of_it_runs_at_once():
    front = Frontend.__new__(Frontend)
    front._max_tokens = 100 * CHOICES_AT_ONCE
    one = Request("r", "m", (1,) * 50, SamplingParams(max_tokens=50), 1, "t", 9.0)
    front._check_room([one] * (10 * CHOICES_AT_ONCE))  # a tenth at a time
    longer = Request("r", "m", (1,) * 51, SamplingParams(max_tokens=50), 1, "t", 9.0)
    with pytest.raises(InvalidRequest, match=rf"{CHOICES_AT_ONCE} of the {CHOICES_AT_ONCE + 9} prompts run at once"):
        front._check_room([one] * 9 + [longer] + [one] * (CHOICES_AT_ONCE - 1))


def test_the_first_choice_of_a_life_is_the_one_whose_token_came_first():
    timeline = Timeline()
    timeline.mark(Instant.ARRIVED, 0.0)
    model = ModelFacts("tiny", b"f" * 16, b"n", "", 4096, 1000, True, "", 1000)
    run = RequestState("r", request(num_choices=3), timeline, model, 16)
    for choice, count in enumerate((4, 5, 6)):
        run.delivery._choices[choice].token_ids.extend(range(count))
    for first, generated in ((0, (4, 5, 6)), (1, (5, 4, 6)), (2, (6, 4, 5)), (None, (4, 5, 6))):
        run.first_choice = first
        assert life_of(run, 1.0).generated == generated
