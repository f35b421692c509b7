"""Streams of the official client while their decode worker drains: they go on elsewhere with the KV that they have."""

import json
import os
import signal
import threading
import time
import urllib.request
from typing import Any

import openai
import pytest

from twostroke.core.inside import InsideChannel
from twostroke.kv.keys import proof_key
from twostroke.protos import worker_pb2, worker_pb2_grpc

MODEL = "twostroke-bundled"
PROMPT = "def add(a, b):\n    return a + b\n\n\n" * 80
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "seeded": {"temperature": 1.0, "seed": 11},
    "two": {"temperature": 1.0, "seed": 12, "n": 2},
}
NUM_TOKENS = 1200
PATIENCE_S = 120.0
pytestmark = pytest.mark.campaign  # tests/worker/test_fetching.py has the same between two workers


@pytest.fixture(params=["off"])
def decoders(run_cluster, request):
    """One prefill and two decode workers as processes. The parameter: whether each stream's KV has a copy."""
    with run_cluster(
        router__kv_journal=request.param,
        cluster__launcher="process",
        cluster__prefill=1,
        cluster__decode=2,
        step__num_threads=1,
        cache__tokens=32768,
    ) as running:
        yield running


def facts_of(cluster: Any, path: str = "/v1/cluster") -> Any:
    with urllib.request.urlopen(cluster.url + path, timeout=10) as answer:
        return json.load(answer)


def workers_of(cluster: Any) -> dict[str, Any]:
    """The live decode workers by name, once all workers are live."""
    end_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < end_s:
        workers = facts_of(cluster)["workers"]
        if len(workers) == 3 and all(worker["state"] == "live" for worker in workers):
            return {worker["worker_id"]: worker for worker in workers if worker["role"] == "decode"}
        time.sleep(0.1)
    raise AssertionError(f"not whole: {facts_of(cluster)['workers']}")


async def drain(address: str, key: str) -> worker_pb2.DrainResponse:
    async with InsideChannel(address, proof_key(key)) as channel:
        return await worker_pb2_grpc.WorkerStub(channel).Drain(worker_pb2.DrainRequest(timeout_ms=1))


def counters_of(cluster: Any, name: str) -> dict[str, int]:
    workers = facts_of(cluster)["workers"]
    return next((worker["counters"] for worker in workers if worker["worker_id"] == name), {})


class Told:
    """What a stream said; `begun` is set at its twentieth piece."""

    def __init__(self, prompt: str = PROMPT) -> None:
        self.prompt = prompt
        self.texts: dict[int, str] = {}
        self.usages: list[tuple[int, int]] = []
        self.num_pieces = 0
        self.name = ""
        self.error: BaseException | None = None
        self.begun = threading.Event()

    def listen(self, client: openai.OpenAI, kind: str) -> None:
        asked = {"max_tokens": NUM_TOKENS, "stream": True, "stream_options": {"include_usage": True}}
        try:
            for chunk in client.completions.create(
                model=MODEL, prompt=self.prompt, extra_body={"ignore_eos": True}, **asked, **KINDS[kind]
            ):
                self.name = chunk.id
                self.num_pieces += 1
                for choice in chunk.choices:
                    self.texts[choice.index] = self.texts.get(choice.index, "") + choice.text
                if chunk.usage is not None:
                    self.usages.append((chunk.usage.prompt_tokens, chunk.usage.completion_tokens))
                if self.num_pieces >= 20:
                    self.begun.set()
        except Exception as error:
            self.error = error
        self.begun.set()


@pytest.mark.timeout(600)
def test_a_drained_workers_streams_take_their_kv_along(decoders):
    for attempt in range(4):  # a worker that drains waits some seconds for them; a busy machine may take longer
        if drained_streams_fetch(decoders, f"# {attempt}\n{PROMPT}"):
            return
        until_replaced(decoders)
    raise AssertionError("no stream took its KV along")


def until_replaced(decoders) -> None:
    end_s = time.monotonic() + PATIENCE_S
    while any(worker["state"] != "live" for worker in facts_of(decoders)["workers"]) and time.monotonic() < end_s:
        time.sleep(0.2)


def drained_streams_fetch(decoders, prompt: str) -> bool:
    """Drain the decode worker of a stream; all streams say the same as undisturbed. True: some blocks were fetched."""
    with openai.OpenAI(base_url=decoders.url + "/v1", api_key="none", max_retries=0, timeout=PATIENCE_S) as client:
        before = workers_of(decoders)
        moved = {kind: Told(prompt) for kind in KINDS}
        threads = [threading.Thread(target=told.listen, args=(client, kind)) for kind, told in moved.items()]
        for thread in threads:
            thread.start()
        assert moved["greedy"].begun.wait(PATIENCE_S)
        victim = facts_of(decoders, f"/v1/requests/{moved['greedy'].name}/explain")["decode_worker"]
        drained = decoders.run(drain(before[victim]["address"], decoders.supervisor.config.cluster.key))
        for thread in threads:
            thread.join(PATIENCE_S)
        heirs = workers_of(decoders)
        whole = {kind: Told(prompt) for kind in KINDS}  # afterwards: they would leave their blocks everywhere before
        for kind, told in whole.items():
            told.listen(client, kind)
            assert told.error is None
    assert drained.cancelled >= 1
    fetched = 0
    for kind, told in moved.items():
        facts = facts_of(decoders, f"/v1/requests/{told.name}/explain")
        assert told.error is None, (kind, told.error, facts["dispatches"])
        assert (told.texts, told.usages) == (whole[kind].texts, whole[kind].usages), kind
        fetched += sum(sum(dispatch["fetched"].values()) for dispatch in facts["dispatches"])
        if kind == "greedy":
            first, *_, last = facts["dispatches"]
            assert (first["decode_worker"], first["left"]["code"]) == (victim, "worker_lost")
            assert last["resumed_tokens"][0] > 0
    assert sum(worker["counters"].get("fetched_blocks", 0) for worker in heirs.values()) * 16 >= fetched
    return fetched > 0


@pytest.mark.timeout(600)
@pytest.mark.parametrize("decoders", ["buddy"], indirect=True)
def test_a_killed_workers_stream_goes_on_with_its_copy(decoders):
    with openai.OpenAI(base_url=decoders.url + "/v1", api_key="none", max_retries=0, timeout=PATIENCE_S) as client:
        before, whole, told = workers_of(decoders), Told(), Told()
        thread = threading.Thread(target=told.listen, args=(client, "seeded"))
        thread.start()
        assert told.begun.wait(PATIENCE_S)
        facts = facts_of(decoders, f"/v1/requests/{told.name}/explain")
        victim, buddy = facts["decode_worker"], facts["dispatches"][-1]["buddy"]
        end_s = time.monotonic() + PATIENCE_S
        while not counters_of(decoders, victim).get("journal_offers") and time.monotonic() < end_s:
            time.sleep(0.01)
        os.kill(before[victim]["pid"], signal.SIGKILL)
        thread.join(PATIENCE_S)
        whole.listen(client, "seeded")
    assert told.error is None
    assert (told.texts, told.usages) == (whole.texts, whole.usages)
    facts = facts_of(decoders, f"/v1/requests/{told.name}/explain")
    assert buddy not in {victim, None}
    report = facts["handover"]
    found = report["tokens_fetched"] + report["prefill_cached_tokens"] + report["tokens_held"]
    assert len(facts["dispatches"]) == 1 or found >= facts["tokens"]["prompt"], "its prompt and answer, or nearly so"
