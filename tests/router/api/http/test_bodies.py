"""Request bodies as clients send them (bodies/*.json), each through the HTTP face as whole answer or stream.

The fields are those that each client's release of November 2026 sent to a server that writes down what it gets, and for
chat interfaces, plain pass-through and older releases those of their public sources; texts, names and ids are our own.
`expect` is the status; `names` is the field that a refusal names.
"""

import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from support.clusters.flow_cluster import cluster
from support.fakes.short_worker import NUM_TOKENS, ShortWorker

from twostroke.router.api.frontend import Frontend
from twostroke.router.api.http.app import make_app
from twostroke.router.config import RouterConfig

pytestmark = pytest.mark.asyncio(loop_scope="module")

BODIES = Path(__file__).parent / "bodies"
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
FIELDS = {"name", "path", "headers", "body", "expect", "names"}


@dataclass(frozen=True)
class Sent:
    """One request of the corpus, and what it must be answered with."""

    client: str
    name: str
    path: str
    body: dict[str, Any]
    headers: dict[str, str]
    expect: int
    names: str | None  # the field that a refusal names

    @property
    def num_choices(self) -> int:
        """Choices of the answer: `n` for every prompt."""
        prompt = self.body.get("prompt")
        num_prompts = len(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1
        return (self.body.get("n") or 1) * num_prompts


def corpus() -> list[Sent]:
    """All requests of all clients."""
    sent = []
    for file in sorted(BODIES.glob("*.json")):
        for entry in json.loads(file.read_text()):
            assert set(entry) <= FIELDS, f"{file.name}: {entry['name']}"
            headers, names = entry.get("headers", {}), entry.get("names")
            known = (entry["name"], entry["path"], entry["body"], headers, entry["expect"], names)
            sent.append(Sent(file.stem, *known))
    return sent


CORPUS = corpus()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def http() -> AsyncIterator[httpx.AsyncClient]:
    """A client of a router with one worker."""
    async with cluster() as there:
        await there.add(ShortWorker("w0", kv_blocks=100_000))
        app = make_app(RouterConfig(), Frontend(RouterConfig(), there.flow))
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60) as client:
            yield client


async def send(http: httpx.AsyncClient, sent: Sent) -> httpx.Response:
    headers = {"content-type": "application/json", **sent.headers}
    return await http.post(sent.path, content=json.dumps(sent.body).encode(), headers=headers)


def served(expect: int) -> list[Any]:
    return [pytest.param(sent, id=f"{sent.client}: {sent.name}") for sent in CORPUS if sent.expect == expect]


@pytest.mark.parametrize("sent", served(200))
async def test_a_clients_body_is_answered(http, sent):
    response = await send(http, sent)
    assert response.status_code == 200, response.text
    if sent.body.get("stream"):
        check_events(sent, response)
    else:
        check_whole(sent, response.json())


@pytest.mark.parametrize("sent", served(400))
async def test_what_would_change_the_answer_is_refused_by_name(http, sent):
    response = await send(http, sent)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert re.split(r"[.\[]", error["param"])[0] == sent.names  # or a part of that field
    assert sent.names in error["message"]


def check_whole(sent: Sent, answer: dict[str, Any]) -> None:
    """Every choice has its text and its end, and the usage adds up."""
    choices = answer["choices"]
    assert answer["object"] == ("chat.completion" if sent.path == CHAT else "text_completion")
    assert [choice["index"] for choice in choices] == list(range(sent.num_choices))
    for choice in choices:
        assert choice["finish_reason"] in {"stop", "length"}
        text = choice["message"]["content"] if sent.path == CHAT else choice["text"]
        assert text or sent.body.get("max_tokens") == 0
        if sent.body.get("logprobs") not in (None, False):
            assert choice["logprobs"]
    usage = answer["usage"]
    assert 0 <= usage["completion_tokens"] <= NUM_TOKENS * sent.num_choices
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def check_events(sent: Sent, response: httpx.Response) -> None:
    """Every choice begins, ends once and is followed by usage where asked for; the last event is [DONE]."""
    assert response.headers["content-type"].startswith("text/event-stream")
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    assert not [chunk for chunk in chunks if "error" in chunk]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    ended = [choice["index"] for choice in choices if choice["finish_reason"]]
    assert sorted(ended) == list(range(sent.num_choices))
    options = sent.body.get("stream_options") or {}
    if options.get("include_usage"):
        assert chunks[-1]["choices"] == []
        assert chunks[-1]["usage"]["completion_tokens"] > 0
    if options.get("continuous_usage_stats"):
        assert all(chunk["usage"]["total_tokens"] > 0 for chunk in chunks)


async def test_the_corpus_has_whole_and_streamed_bodies_of_both_endpoints_and_refusals(http):
    kinds = {(sent.path, bool(sent.body.get("stream")), sent.expect) for sent in CORPUS}
    assert kinds >= {(path, stream, 200) for path in (CHAT, COMPLETIONS) for stream in (False, True)}
    assert {sent.path for sent in CORPUS if sent.expect == 400} == {CHAT, COMPLETIONS}
