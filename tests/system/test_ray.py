"""A real cluster on Ray, and what happens to it: concurrent streams, clients that leave, workers that die or freeze.

Waits poll what the router reports. Bounds that are promises are marked as such; the others only keep a test from
hanging on a busy machine. Every test begins with a whole, idle cluster, and so proves that the one before left one.
"""

import os
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
import openai
import psutil
import pytest
from support.clusters.observer import Footprint, Observer, Workers, brief, descendants, send_signal
from support.clusters.sockets import check_listeners, declared_by, listeners
from support.fakes.visitors import MODEL, Crowd, OpenAiVisitor, SdkVisitor, SocketVisitor, Told, Visitor, prompt_of

from twostroke import Client

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

WORKERS = {"prefill-0", "prefill-1", "decode-0", "decode-1"}
REPLACE_AFTER_S = 8.0
BUSY_MACHINE_S = 200.0  # what may take long only because others compute here too


@pytest.fixture(scope="module")
def cluster(run_cluster: Any) -> Iterator[Any]:
    """Two and two on Ray. At the end nothing of it may be left: no process, no directory, no shared memory."""
    small = {"step__num_threads": 1, "step__max_num_batched_tokens": 256, "cache__tokens": 16384}
    patience = {"cluster__ready_timeout_s": 300.0, "cluster__replace_after_s": REPLACE_AFTER_S}
    of_others = descendants()  # such as the resource tracker of an earlier test's `multiprocessing`
    with run_cluster(
        cluster__launcher="ray",
        cluster__prefill=2,
        cluster__decode=2,
        router__local_prefill=False,  # every prompt that can be handed over is
        **small,
        **patience,
    ) as running:
        running.of_others = of_others
        yield running
        footprint = _footprint(running)
        assert len(footprint.processes) > len(WORKERS)
        assert len(footprint.directories) == 1, footprint.directories
    footprint.until_gone(30.0)
    assert "ray" not in sys.excepthook.__module__  # its hook would hide what an uncaught exception says


@pytest.fixture
def observer(cluster: Any) -> Iterator[Observer]:
    """Eyes on a cluster that is whole and idle."""
    observer = Observer(cluster.grpc)
    observer.until_whole(WORKERS, BUSY_MACHINE_S)
    observer.until_idle(BUSY_MACHINE_S)
    yield observer
    observer.close()


def _footprint(cluster: Any) -> Footprint:
    observer = Observer(cluster.grpc)
    facts = observer.facts()
    observer.close()
    members = {psutil.Process(member["pid"]) for member in (facts["router"], *facts["workers"])}
    return Footprint(members | descendants() - cluster.of_others)


def _crowd(cluster: Any, name: str) -> Crowd:
    return Crowd(cluster.url, cluster.grpc, name)


def _without_fault(cluster: Any, all_told: list[Told], name: str) -> None:
    """Every stream is a prefix of the text that a calm cluster gives to the same prompt; a whole one is all of it."""
    calm_of = {}
    for attempt in range(3):  # on a machine that is too busy, even a calm cluster may find a worker silent
        with _crowd(cluster, f"{name}-{attempt}") as crowd:
            asked = [told for told in all_told if told.request_id not in calm_of]
            for told in asked:
                crowd.sdk(told.prompt, told.max_tokens)
        calm_of |= {told.request_id: calm for told, calm in zip(asked, crowd.told, strict=True) if calm.is_whole}
    assert len(calm_of) == len(all_told), [told.error_code for told in crowd.told]
    for told in all_told:
        calm = calm_of[told.request_id]
        if told.is_whole:
            assert told.text == calm.text
        else:
            assert calm.text.startswith(told.text)
            assert calm.token_ids[: len(told.token_ids)] == told.token_ids


# ---------------------------------------------------------------- what it listens on

RAYS_OWN = {  # each on loopback alone; README names them
    "gcs_server": r"/gcs_server ",
    "raylet": r"/raylet/raylet ",
    "autoscaler's monitor": r"/monitor\.py ",
    "runtime environments": r"^ray::RuntimeEnvAgent",
    "idle worker": r"^ray::IDLE",
    "our actor": r"^ray::(Router|PrefillWorker|DecodeWorker)",
}


@pytest.mark.campaign
def test_all_sockets_are_declared_and_on_loopback(cluster: Any, observer: Observer):
    here = psutil.Process()
    assert all(folder.stat().st_mode & 0o77 == 0 for folder in _footprint(cluster).directories)
    processes = [here, *here.children(recursive=True), *_footprint(cluster).processes]
    ports = {"port": urlsplit(cluster.url).port or 0, "grpc_port": int(cluster.grpc.rpartition(":")[2])}
    ports["internal_port"] = cluster.supervisor.config.router.internal_port
    others = check_listeners(listeners(set(processes)), declared_by(observer.facts(), **ports))
    kinds = Counter()
    for other in others:
        known = [kind for kind, name in RAYS_OWN.items() if re.search(name, other.process)]
        kinds[known[0] if known else "driver" if other.process == " ".join(here.cmdline()) else other.process] += 1
    seldom = {"idle worker", "autoscaler's monitor"}  # they come and go, and listen late on a busy machine
    assert set(kinds) - seldom == {*RAYS_OWN, "driver"} - seldom, others


def test_the_clusters_key_is_in_no_file_and_no_argument_of_ray(cluster: Any):
    key = cluster.supervisor.config.cluster.key.encode()
    footprint = _footprint(cluster)
    files = [path for folder in footprint.directories for path in folder.rglob("*") if path.is_file()]
    assert len(files) > len(WORKERS)
    assert [path for path in files if key in path.read_bytes()] == []
    for process in footprint.processes:
        for shown in (*process.cmdline(), *process.environ().values()):
            assert key.decode() not in shown


def test_a_client_of_ray_without_the_token_is_refused(cluster: Any):
    """Asks Ray's head for its id, as every client does first. The request has no field that must be set."""
    import ray

    address = ray.get_runtime_context().gcs_address
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    assert token.stat().st_mode & 0o77 == 0
    answers = {}
    for shown in (None, "0" * 64, token.read_text()):
        metadata = [("authorization", f"Bearer {shown}")] if shown else []
        with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
            ask = channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")
            try:
                ask(b"", timeout=60, metadata=metadata)
                answers[shown] = grpc.StatusCode.OK
            except grpc.RpcError as error:
                answers[shown] = error.code()
    assert list(answers.values()) == [grpc.StatusCode.UNAUTHENTICATED] * 2 + [grpc.StatusCode.OK]


# ---------------------------------------------------------------- all is well


def test_concurrent_streams_are_whole_and_equal_and_explained(cluster: Any, observer: Observer):
    prompts = [prompt_of(length, seed=length) for length in (40, 170, 600)]
    with _crowd(cluster, "calm") as crowd:
        for n in range(12):
            read = crowd.http if n % 3 == 2 else crowd.sdk
            read(prompts[n % 2 + n // 6], 40)
        client = openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", timeout=BUSY_MACHINE_S)
        ours: dict[str, Any] = {"extra_body": {"ignore_eos": True, "request_id": "calm-openai"}}
        stream = client.completions.create(
            model=MODEL, prompt=prompts[2], max_tokens=40, temperature=0, stream=True, **ours
        )
        official = "".join(chunk.choices[0].text for chunk in stream)
        client.close()
    assert [told.error_code for told in crowd.told if not told.is_whole] == []
    texts = {id(prompt): {told.text for told in crowd.told if told.prompt is prompt} for prompt in prompts}
    texts[id(prompts[2])].add(official)
    assert all(len(found) == 1 for found in texts.values()), texts
    assert all(len(told.token_ids) == 40 for told in crowd.told if told.token_ids)
    explained = [observer.explain(told.request_id) for told in crowd.told] + [observer.explain("calm-openai")]
    _check_explained([found for found in explained if found is not None], 13)


def _check_explained(explained: list[dict[str, Any]], count: int) -> None:
    assert len(explained) == count
    assert {found["state"] for found in explained} == {"finished"}
    assert {found["decode_worker"] for found in explained} == {"decode-0", "decode-1"}
    handed_over = [found for found in explained if found["kv_bytes_moved"]]
    assert len(handed_over) >= 3  # each prompt once at least
    for found in handed_over:
        assert found["prefill_worker"] in ("prefill-0", "prefill-1")
        assert 0 < found["kv_bytes_moved"] < found["kv_bytes_as_bf16"]
        order = list(found["timeline"])
        for chain in (
            "arrived admitted routed received promised bound first_frame last_frame second_token finished",
            "routed received promised offered started prefilled first_token second_token finished",
            "first_token first_sent finished",
        ):
            names = chain.split()
            assert [name for name in order if name in names] == names, found["timeline"]


# ---------------------------------------------------------------- clients that leave


def _busy(role: str) -> Any:
    def holds(workers: Workers) -> bool:
        return any(w["role"] == role and w["blocks"]["free"] < w["blocks"]["total"] for w in workers.values())

    return holds


@pytest.mark.parametrize("kind", [SocketVisitor, SdkVisitor, OpenAiVisitor])
def test_a_client_that_leaves_in_mid_stream_frees_all_its_blocks(cluster: Any, observer: Observer, kind: Any):
    took_s = []
    for n in range(3):
        cancelled = observer.facts()["counters"]["cancelled"]
        name = f"{kind.__name__}-{n}"
        visitor: Visitor = kind(cluster.url, cluster.grpc, prompt_of(300, seed=name), 3000, name)
        visitor.listen()
        observer.until(_busy("decode"), BUSY_MACHINE_S, "the decode worker at work")
        visitor.leave()
        took_s.append(observer.until_idle(BUSY_MACHINE_S))
        assert observer.facts()["counters"]["cancelled"] == cancelled + 1  # it had not come to its end
    assert min(took_s) < 1.0, took_s  # the promise; the other rounds may have met a busy machine


@pytest.mark.parametrize("kind", [SocketVisitor, SdkVisitor])
def test_clients_that_leave_before_the_first_token_free_all_their_blocks(cluster: Any, observer: Observer, kind: Any):
    took_s, completions = [], []
    for n in range(3):
        cancelled = observer.facts()["counters"]["cancelled"]
        names = [f"early-{kind.__name__}-{n}-{m}" for m in range(3)]
        visitors = [kind(cluster.url, cluster.grpc, prompt_of(3000, seed=name), 500, name) for name in names]
        observer.until(_busy("prefill"), BUSY_MACHINE_S, "a prefill worker at work")
        for name in names:
            observer.await_decode_worker(name)
        for visitor in visitors:
            visitor.leave()
        took_s.append(observer.until_idle(BUSY_MACHINE_S))
        assert observer.facts()["counters"]["cancelled"] == cancelled + 3
        completions += [(observer.explain(name) or {})["tokens"]["completion"] for name in names]
    assert completions.count(0) >= 3, completions  # most were still being prefilled, or waited for it
    assert min(took_s) < 1.0, took_s


# ---------------------------------------------------------------- workers that die


@pytest.mark.campaign
def test_the_streams_of_a_killed_decode_worker_go_on_elsewhere_and_it_comes_back(cluster: Any, observer: Observer):
    before = observer.workers()
    with _crowd(cluster, "killed") as crowd:
        for n in range(12):
            read = crowd.http if n % 3 == 2 else crowd.sdk
            read(prompt_of(50, seed=700 + n), 800)
        crowd.until_all_heard()
        streaming = list(crowd.told)
        place_of = {told.request_id: observer.await_decode_worker(told.request_id) for told in streaming}
        victim = Counter(place_of.values()).most_common(1)[0][0]
        unheard = [crowd.sdk(prompt_of(900, seed=800 + n), 20) for n in range(4)]
        for told in unheard:
            observer.await_decode_worker(told.request_id)
        send_signal(before[victim], signal.SIGKILL)
        back_s = observer.until(
            lambda workers: _is_replaced(workers, before, victim), BUSY_MACHINE_S, f"a new {victim} live"
        )
    assert [told.error_code for told in (*streaming, *unheard) if not told.is_whole] == []
    explained = [observer.explain(told.request_id) or {} for told in streaming]
    assert any(any(dispatch["resumed_tokens"]) for facts in explained for dispatch in facts["dispatches"])
    assert any(place != victim for place in place_of.values())
    observer.until_whole(WORKERS, BUSY_MACHINE_S)
    observer.until_idle(10.0)
    assert back_s < 30.0 or _is_busy_machine(), back_s
    _without_fault(cluster, streaming + unheard, "after-kill")


def _is_replaced(workers: Workers, before: Workers, name: str) -> bool:
    return (
        set(workers) == WORKERS
        and all(worker["state"] == "live" for worker in workers.values())
        and workers[name]["incarnation"] != before[name]["incarnation"]
    )


def _is_busy_machine() -> bool:
    """Whether the promised times mean nothing just now, because others want the cores too."""
    return os.getloadavg()[0] > 2 * (os.cpu_count() or 1)


@pytest.mark.campaign
def test_a_killed_prefill_worker_fails_no_request(cluster: Any, observer: Observer):
    before = observer.workers()
    with _crowd(cluster, "prefill-killed") as crowd:
        for n in range(8):
            crowd.sdk(prompt_of(1200, seed=900 + n), 24)
        observer.until(_busy("prefill"), BUSY_MACHINE_S, "a prefill worker at work")
        now = observer.workers()
        victim = max(("prefill-0", "prefill-1"), key=lambda name: now[name]["in_flight"])
        assert now[victim]["in_flight"], brief(now)
        send_signal(before[victim], signal.SIGKILL)
    assert [told.error_code for told in crowd.told if not told.is_whole] == []
    observer.until(lambda workers: _is_replaced(workers, before, victim), BUSY_MACHINE_S, f"a new {victim} live")
    observer.until_idle(10.0)
    _without_fault(cluster, crowd.told, "after-prefill-kill")


@pytest.mark.campaign
def test_a_worker_that_is_told_to_end_lets_its_streams_end_and_is_replaced(cluster: Any, observer: Observer):
    before = observer.workers()
    with _crowd(cluster, "told-to-end") as crowd:
        for n in range(6):
            crowd.sdk(prompt_of(50, seed=1500 + n), 100)
        crowd.until_all_heard()
        victim = observer.await_decode_worker(crowd.told[0].request_id)
        send_signal(before[victim], signal.SIGTERM)
    assert [told.error_code for told in crowd.told if not told.is_whole] == []
    observer.until(lambda workers: _is_replaced(workers, before, victim), BUSY_MACHINE_S, f"a new {victim} live")
    observer.until_idle(10.0)


# ---------------------------------------------------------------- workers that freeze


@pytest.mark.campaign
def test_a_frozen_decode_worker_is_avoided_and_its_peers_free_what_they_hold(cluster: Any, observer: Observer):
    """It freezes while a hand-over to it is under way, thaws before it would be replaced, and serves again."""
    before = observer.workers()
    with _crowd(cluster, "frozen") as crowd:
        for n in range(8):
            crowd.sdk(prompt_of(50, seed=1000 + n), 200)
        crowd.until_all_heard()
        # So many that prefill is still at it when a report that it works has come: one is over before that.
        names = [f"frozen-handover-{n}" for n in range(8)]
        handovers = [SdkVisitor(cluster.url, cluster.grpc, prompt_of(3500, seed=name), 4, name) for name in names]
        victim = [observer.await_decode_worker(name) for name in names][-1]
        observer.until(_busy("prefill"), BUSY_MACHINE_S, "a prefill worker at work")
        silent = _silent_ends(observer.workers())
        send_signal(before[victim], signal.SIGSTOP)
        frozen_s = time.monotonic()
        try:
            for handover in handovers:
                handover.leave()  # and is not sent elsewhere: what prefill holds now, it holds for the frozen one
            observer.until(lambda workers: not _busy("prefill")(workers), 30.0, "the peers hold nothing")
            freed_s = time.monotonic() - frozen_s
            assert freed_s < 5.0 or _is_busy_machine(), freed_s
            # It was the lease that ended them; counters come with a later beat than the blocks.
            observer.until(lambda workers: _silent_ends(workers) > silent, 5.0, "a hand-over ended by silence")
            observer.until(lambda w: victim not in w or w[victim]["state"] != "live", 10.0, f"{victim} is avoided")
            _ask_in_the_meantime(cluster, observer, victim)
        finally:
            send_signal(before[victim], signal.SIGCONT)
    for told in crowd.told:
        assert told.is_whole, told
    observer.until_whole(WORKERS, BUSY_MACHINE_S)
    observer.until_idle(BUSY_MACHINE_S)
    _without_fault(cluster, crowd.told, "after-thaw")


def _silent_ends(workers: Workers) -> int:
    return sum(int(worker["counters"].get("handover_aborted_silent", 0)) for worker in workers.values())


def _ask_in_the_meantime(cluster: Any, observer: Observer, frozen: str) -> None:
    """New requests do not go to the frozen one."""
    with _crowd(cluster, "meantime") as crowd:
        for n in range(3):
            crowd.sdk(prompt_of(20, seed=1200 + n), 4)
    assert [told.error_code for told in crowd.told if not told.is_whole] == []
    assert frozen not in {(observer.explain(told.request_id) or {})["decode_worker"] for told in crowd.told}


@pytest.mark.campaign
@pytest.mark.parametrize("role", ["decode", "prefill"])
def test_a_worker_that_stays_frozen_is_replaced(cluster: Any, observer: Observer, role: str):
    before = observer.workers()
    victim = f"{role}-1"
    frozen = Footprint([psutil.Process(before[victim]["pid"])])
    send_signal(before[victim], signal.SIGSTOP)
    answers: list[Any] = []
    asking = threading.Thread(target=lambda: answers.append(_ask(cluster)))
    asking.start()
    observer.until(lambda workers: _is_replaced(workers, before, victim), BUSY_MACHINE_S, f"a new {victim} live")
    asking.join(BUSY_MACHINE_S)
    assert answers == [8]
    frozen.directories.clear()
    frozen.until_gone(5.0)  # the frozen one is dead, not forgotten
    assert [line for line in cluster.said if line.startswith(f"{victim} runs but cannot be used")]


def _ask(cluster: Any) -> int:
    with Client(cluster.grpc, timeout_s=BUSY_MACHINE_S) as client:
        done = client.generate(prompt_of(200, seed=1300), max_tokens=8, temperature=0.0, ignore_eos=True)
        return len(done.choices[0].token_ids)
