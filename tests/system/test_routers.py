"""Several routers as processes: one is killed under load. Resumable streams go on elsewhere, byte for byte."""

import json
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from support.session.redis_server import redis_server

from twostroke.client.client import Client
from twostroke.core.errors import RequestNotFound

MODEL = "twostroke-bundled"
PROMPT = "def add(a, b):\n    return a + b\n\n\ndef main():\n    "
ASKED: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 160, "ignore_eos": True, "temperature": 1.0}
PATIENCE_S = 90.0


@pytest.fixture(scope="module")
def cluster(run_cluster) -> Iterator[Any]:
    with (
        redis_server() as server,
        run_cluster(
            cluster__launcher="process",
            cluster__routers=2,
            cluster__prefill=1,
            cluster__decode=1,
            cluster__replace_after_s=5.0,
            step__num_threads=1,
            cache__tokens=16384,
            router__journal_url=server.url,
        ) as running,
    ):
        yield running


def report(cluster: Any) -> dict[str, Any]:
    with urllib.request.urlopen(cluster.url + "/v1/cluster", timeout=10) as answer:
        found: dict[str, Any] = json.load(answer)
        return found


def report_or_nothing(cluster: Any) -> list[dict[str, Any]]:
    """The routers; none where the one that was asked breaks off."""
    try:
        return list(report(cluster)["routers"])
    except OSError:
        return []


def until_whole(cluster: Any) -> dict[str, int]:
    """Wait until both routers have all workers; returns the routers' pids by name."""
    end_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < end_s:
        routers = report_or_nothing(cluster)
        if len(routers) == 2 and all(list(r["workers"].values()) == ["live", "live"] for r in routers):
            return {router["name"]: router["pid"] for router in routers}
        time.sleep(0.2)
    raise AssertionError(report(cluster))


class Reader(threading.Thread):
    """One SSE client that comes back with Last-Event-ID whenever its connection breaks."""

    def __init__(self, url: str, seed: int) -> None:
        super().__init__(daemon=True)
        self._url = url + "/v1/completions"
        self._body = {**ASKED, "seed": seed, "stream": True, "stream_options": {"include_usage": True}}
        self.events: list[str] = []
        self.num_breaks = 0
        self.error = ""
        self.begun = threading.Event()

    def run(self) -> None:
        end_s = time.monotonic() + PATIENCE_S
        while "data: [DONE]" not in self.events[-1:] and not self.error and time.monotonic() < end_s:
            try:
                self._follow()
            except httpx.HTTPError:
                self.num_breaks += 1
                time.sleep(0.1)
        self.begun.set()

    def _follow(self) -> None:
        ids = [event.split("\n")[0][4:] for event in self.events if event.startswith("id: ")]
        headers = {"last-event-id": ids[-1]} if ids else {"x-twostroke-resumable": "1"}
        with (
            httpx.Client(timeout=30) as client,
            client.stream("POST", self._url, json=self._body, headers=headers) as got,
        ):
            if got.status_code == 503:
                raise httpx.ConnectError("not now")
            if got.status_code != 200:
                self.error = f"{got.status_code} {got.read()!r}"
                return
            text = ""
            for part in got.iter_text():
                *whole, text = (text + part).split("\n\n")
                for event in whole:
                    if '"error":' in event:
                        raise httpx.ReadError(event)
                    self.events.append(event)
                if len(self.events) > 12:
                    self.begun.set()

    @property
    def said(self) -> tuple[str, Any]:
        values = [json.loads(event.split("data: ")[1]) for event in self.events[:-1]]
        return "".join(v["choices"][0]["text"] for v in values if v["choices"]), values[-1]["usage"][
            "completion_tokens"
        ]


def play(readers: list[Reader]) -> None:
    for reader in readers:
        reader.start()
    for reader in readers:
        assert reader.begun.wait(PATIENCE_S)


def ended(readers: list[Reader]) -> None:
    for reader in readers:
        reader.join(PATIENCE_S)
        assert not reader.error, reader.error
        assert reader.events[-1:] == ["data: [DONE]"]


@pytest.mark.campaign
def test_a_router_is_killed_under_load_and_all_its_streams_go_on(cluster: Any):
    until_whole(cluster)
    whole = [Reader(cluster.url, seed) for seed in range(8)]
    play(whole)
    ended(whole)
    for _ in range(5):  # all may be at the other router, or have been told everything before the kill
        pids = until_whole(cluster)
        readers = [Reader(cluster.url, seed) for seed in range(8)]
        play(readers)
        os.kill(pids["router-0"], signal.SIGKILL)
        ended(readers)
        assert [reader.said for reader in readers] == [reader.said for reader in whole]
        for reader in readers:
            ids = [event.split("\n")[0] for event in reader.events if event.startswith("id: ")]
            assert len(ids) == len(set(ids))
        assert until_whole(cluster)["router-0"] != pids["router-0"]
        if len({reader.num_breaks > 0 for reader in readers}) == 2:
            return
    raise AssertionError("no kill took some of the connections, and its own alone")


@pytest.mark.campaign
def test_a_frozen_router_is_replaced_and_costs_connections_a_pause(cluster: Any):
    """The kernel goes on to deal connections out to it: they wait until it is replaced, and then they break."""
    pids = until_whole(cluster)
    os.kill(pids["router-1"], signal.SIGSTOP)
    began_s, answered, num_broken = time.monotonic(), 0, 0
    while time.monotonic() - began_s < PATIENCE_S and answered < 20:
        try:
            with httpx.Client(timeout=PATIENCE_S) as client:
                assert client.get(cluster.url + "/health").status_code == 200
            answered += 1
        except httpx.HTTPError:
            num_broken += 1  # at most those that it had when it was ended
    assert answered == 20
    assert num_broken <= 2, "one after the other: a connection that hangs breaks once, when the router is replaced"
    deadline_s = time.monotonic() + PATIENCE_S
    now = until_whole(cluster)
    while now["router-1"] == pids["router-1"] and time.monotonic() < deadline_s:
        time.sleep(0.2)
        now = until_whole(cluster)
    assert now["router-1"] != pids["router-1"]
    assert now["router-0"] == pids["router-0"], "and the other one is left alone"


def test_the_sdk_comes_back_by_itself(cluster: Any):
    pids = until_whole(cluster)
    with Client(cluster.grpc, timeout_s=PATIENCE_S) as client:
        options: Any = {"max_tokens": 160, "ignore_eos": True, "seed": 3, "temperature": 1.0}
        whole = client.generate(PROMPT, **options)
        stream = client.generate_stream(PROMPT, resumable=True, **options)
        chunks = [next(stream) for _ in range(10)]
        name = client.cluster()["router"]["name"]  # the same connection
        os.kill(pids[name], signal.SIGKILL)
        chunks += stream
        assert tuple(t for chunk in chunks for t in chunk.token_ids) == whole.choices[0].token_ids
        assert "".join(chunk.text for chunk in chunks) == whole.text
        with pytest.raises(RequestNotFound):
            list(client.resume("nobody-has-this"))


def test_the_official_client_sees_nothing_of_all_this(cluster: Any):
    until_whole(cluster)
    with openai.OpenAI(base_url=cluster.url + "/v1", api_key="none", max_retries=0, timeout=PATIENCE_S) as client:
        plain = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=20, seed=1)
        wished = client.completions.create(
            model=MODEL, prompt=PROMPT, max_tokens=20, seed=1, extra_headers={"idempotency-key": "of-the-client"}
        )
        assert plain.choices[0].text == wished.choices[0].text
        again = client.completions.create(
            model=MODEL, prompt=PROMPT, max_tokens=20, seed=1, extra_headers={"idempotency-key": "of-the-client"}
        )
        assert again.model_dump() == wished.model_dump()
        with pytest.raises(openai.UnprocessableEntityError):
            client.completions.create(
                model=MODEL, prompt="other", max_tokens=20, extra_headers={"idempotency-key": "of-the-client"}
            )
        chat = [{"role": "user", "content": "What does os.path.join do?"}]
        said = client.chat.completions.create(
            model=MODEL,
            messages=chat,
            max_tokens=20,
            stream=True,
            extra_headers={"x-twostroke-resumable": "1"},  # type: ignore[arg-type]
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in said)


def test_background_responses_go_on_behind_their_numbers_when_a_router_is_killed(cluster: Any):
    """The official client's own way: it remembers the id and the last sequence number, and asks for the rest."""
    asked: dict[str, Any] = {"model": MODEL, "input": "What does os.path.join do?", "max_output_tokens": 300}
    asked["extra_body"] = {"seed": 5, "ignore_eos": True, "temperature": 1.0}
    with openai.OpenAI(base_url=cluster.url + "/v1", api_key="none", max_retries=8, timeout=PATIENCE_S) as client:
        whole = client.responses.create(**asked)
        for _ in range(5):  # a router may have said everything before it is killed
            until_whole(cluster)
            streams = [client.responses.create(**asked, background=True, stream=True) for _ in range(6)]
            had = [[next(stream) for _ in range(12)] for stream in streams]
            busiest = max(report(cluster)["routers"], key=lambda router: router["in_flight_requests"])
            os.kill(busiest["pid"], signal.SIGKILL)
            num_breaks = sum(
                goes_on_behind_its_numbers(client, stream, events, whole.output_text)
                for stream, events in zip(streams, had, strict=True)
            )
            if num_breaks:
                return
    raise AssertionError("none was at a router that died")


def goes_on_behind_its_numbers(client: openai.OpenAI, stream: Any, events: list[Any], text: str) -> bool:
    """Read a stream to its end, and what was lost of it behind its last number; returns True if it broke."""
    is_broken = False
    try:
        events.extend(stream)
    except (httpx.HTTPError, openai.APIError):
        is_broken = True
    name = events[0].response.id
    while events[-1].type != "response.incomplete":
        after = events[-1].sequence_number
        events.extend(client.responses.retrieve(name, stream=True, starting_after=after))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == text
    assert client.responses.retrieve(name) == events[-1].response
    return is_broken
