"""Streams of the official client while their decode worker is killed or frozen: they say what they say undisturbed."""

import contextlib
import json
import os
import random
import signal
import threading
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import openai
import pytest

MODEL = "twostroke-bundled"
HELLO = [{"role": "user", "content": "What does os.path.join do?"}]
PROMPT = "def add(a, b):\n    return a + b\n\n\ndef main():\n    "
LONG = {"max_tokens": 400, "extra_body": {"ignore_eos": True}}
SEEDED = {**LONG, "temperature": 1.0, "seed": 11}
ROW = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 20}, "size": {"type": "integer"}}}
ROWS = {"type": "array", "minItems": 60, "items": ROW | {"required": ["name", "size"], "additionalProperties": False}}
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {**LONG, "temperature": 0},
    "seeded": SEEDED,
    "three": {**SEEDED, "n": 3},
    "stop": {**SEEDED, "stop": ["zzz", "import x", "\n\n\n\n"]},
    "logprobs": {**LONG, "temperature": 0, "logprobs": 2},
    "penalties": {**SEEDED, "frequency_penalty": 0.5, "presence_penalty": 0.3},
    "grammar": {"max_tokens": 400, "temperature": 1.0, "seed": 11, "n": 3, "extra_body": {"guided_json": ROWS}},
    "echo": {**SEEDED, "echo": True, "logprobs": 1},
    "chat": {**SEEDED, "messages": HELLO, "logprobs": True, "top_logprobs": 2},
}
PATIENCE_S = 120.0
SEED = 20
ALL = ["greedy", "three", "stop", "chat"]


@pytest.fixture(scope="module")
def decoders(run_cluster) -> Iterator[Any]:
    """Two decode workers as processes: one is killed, the other goes on."""
    with run_cluster(
        cluster__launcher="process",
        cluster__prefill=1,
        cluster__decode=2,
        step__num_threads=1,
        cache__tokens=16384,
    ) as running:
        yield running


@pytest.fixture(scope="module")
def client(decoders) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=decoders.url + "/v1", api_key="none", max_retries=0, timeout=PATIENCE_S) as made:
        yield made


def facts_of(cluster: Any, path: str = "/v1/cluster") -> Any:
    with urllib.request.urlopen(cluster.url + path, timeout=10) as answer:
        return json.load(answer)


def until_whole(cluster: Any) -> dict[str, int]:
    """Wait until all workers are live; returns the pids of the decode workers by name."""
    end_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < end_s:
        workers = facts_of(cluster)["workers"]
        if len(workers) == 3 and all(worker["state"] == "live" for worker in workers):
            return {worker["worker_id"]: worker["pid"] for worker in workers if worker["role"] == "decode"}
        time.sleep(0.1)
    raise AssertionError(f"not whole: {facts_of(cluster)['workers']}")


class Told:
    """What a stream said; `begun` is set at its tenth piece."""

    def __init__(self) -> None:
        self.texts: dict[int, str] = {}
        self.reasons: dict[int, str] = {}
        self.scores: dict[int, list[Any]] = {}
        self.usages: list[tuple[int, int]] = []
        self.num_pieces = 0
        self.name = ""
        self.error: BaseException | None = None
        self.begun = threading.Event()

    def hear(self, chunk: Any) -> None:
        self.name = chunk.id
        self.num_pieces += 1
        for choice in chunk.choices:
            text = choice.text if hasattr(choice, "text") else (choice.delta.content or "")
            self.texts[choice.index] = self.texts.get(choice.index, "") + text
            if choice.logprobs is not None:
                self.scores.setdefault(choice.index, []).extend(_rows(choice.logprobs))
            if choice.finish_reason:
                assert choice.index not in self.reasons, "a choice ended twice"
                self.reasons[choice.index] = choice.finish_reason
        if chunk.usage is not None:
            self.usages.append((chunk.usage.prompt_tokens, chunk.usage.completion_tokens))
        if self.num_pieces >= 10:
            self.begun.set()

    @property
    def said(self) -> tuple[Any, ...]:
        return self.texts, self.reasons, self.scores, self.usages


def _rows(logprobs: Any) -> list[Any]:
    if hasattr(logprobs, "content"):
        return [one.model_dump() for one in logprobs.content or ()]
    return list(zip(logprobs.tokens, logprobs.token_logprobs, logprobs.text_offset, logprobs.top_logprobs, strict=True))


def listen(client: openai.OpenAI, kind: str, told: Told) -> None:
    asked = {"model": MODEL, "stream": True, "stream_options": {"include_usage": True}, **KINDS[kind]}
    try:
        stream = client.chat.completions.create(**asked) if kind == "chat" else _complete(client, asked)
        for chunk in stream:
            told.hear(chunk)
    except Exception as error:
        told.error = error
    told.begun.set()


def _complete(client: openai.OpenAI, asked: dict[str, Any]) -> Any:
    return client.completions.create(prompt=PROMPT, **asked)


@pytest.fixture(scope="module")
def undisturbed(decoders, client) -> dict[str, Told]:
    until_whole(decoders)
    found = {kind: Told() for kind in KINDS}
    for kind, told in found.items():
        listen(client, kind, told)
        assert told.error is None, (kind, told.error)
        assert len(told.usages) == 1
    return found


def disturb(cluster: Any, client: openai.OpenAI, kinds: list[str], how: signal.Signals, rng: random.Random) -> Any:
    """Run streams of these kinds at once; at a random moment the decode worker of the first one is killed or frozen.

    Returns what they said, and the explanations of all.
    """
    pids = until_whole(cluster)
    told = [Told() for _ in kinds]
    threads = [threading.Thread(target=listen, args=(client, *pair)) for pair in zip(kinds, told, strict=True)]
    for thread in threads:
        thread.start()
    assert told[0].begun.wait(PATIENCE_S)
    time.sleep(rng.random() * 0.2)
    victim = facts_of(cluster, f"/v1/requests/{told[0].name}/explain")["decode_worker"]
    os.kill(pids[victim], how)
    for thread in threads:
        thread.join(PATIENCE_S)
    if how == signal.SIGSTOP:
        with contextlib.suppress(ProcessLookupError):  # the supervisor has replaced it, or is about to
            os.kill(pids[victim], signal.SIGCONT)
    return told, [facts_of(cluster, f"/v1/requests/{one.name}/explain") for one in told]


@pytest.mark.campaign  # tests/worker/test_resume.py kills at every token, in one process
@pytest.mark.timeout(600)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_streams_survive_the_loss_of_their_decode_worker(decoders, client, undisturbed, how):
    rng = random.Random(SEED)
    resumed = 0
    for first in ALL:  # whose worker is lost
        kinds = [first, *(kind for kind in KINDS if kind != first)]
        told, explained = disturb(decoders, client, kinds, how, rng)
        for kind, one, facts in zip(kinds, told, explained, strict=True):
            assert one.error is None, (kind, one.error, facts["dispatches"])
            assert one.said == undisturbed[kind].said, (kind, facts["dispatches"])
            resumed += sum(any(dispatch["resumed_tokens"]) for dispatch in facts["dispatches"])
    assert resumed >= 2, "the workers were lost too late"
    until_whole(decoders)
