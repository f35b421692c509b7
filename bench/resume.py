"""How streams fare while their workers are killed and frozen at random moments, through the official client.

    python bench/resume.py [--role decode|prefill] [--how kill|freeze] [--rounds 100] [--seed 1]
    python bench/resume.py pauses [--how drain|kill|none] [--journal] [--prefill 0] [--context 3000] [--trials 6]

Each round runs one stream of every kind (tests/system/test_resume.py) on two prefill and two decode workers of the
bundled model, as processes, and kills or freezes one worker of the role at a random moment. Counted: streams whose
text, reasons, logprobs and usage equal the undisturbed run's; streams that went on at another worker; their longest
pause, as `explain` tells it. Exit status 1: a stream differed or failed.

`pauses`: each trial is one stream of random ids on two decode workers and `--prefill` prefill workers. After 40 tokens
its decode worker gets SIGTERM (with a grace of 1 s) or SIGKILL; then the same stream runs once more, undisturbed.
Printed: the longest pause that the client saw after the signal, whether both texts are equal, where the blocks came
from, and how long the process lived on. `--how none`: `--streams` streams at once, undisturbed; printed: time between
tokens. PYTHONPATH chooses the release that is measured. Exit status 1: a stream failed, differed, or was not disturbed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import random
import signal
import statistics
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import openai

ROOT = Path(__file__).resolve().parents[1]
NUM_TOKENS = 700
BEFORE = 40  # tokens before the signal
GRACE_S = 1.0
PATIENCE_S = 120.0
VOCABULARY = 4096


def load(path: Path) -> ModuleType:
    """A module of the tests, by its file."""
    if str(ROOT / "tests") not in sys.path:
        sys.path.append(str(ROOT / "tests"))  # for the helpers that tests share
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pids_of(tests: ModuleType, cluster: Any, role: str) -> dict[str, int]:
    """Pids of the live workers of a role, once all four are live."""
    end_s = time.monotonic() + tests.PATIENCE_S
    while time.monotonic() < end_s:
        workers = tests.facts_of(cluster)["workers"]
        if len(workers) == 4 and all(worker["state"] == "live" for worker in workers):
            return {worker["worker_id"]: worker["pid"] for worker in workers if worker["role"] == role}
        time.sleep(0.1)
    raise SystemExit("the cluster did not become whole again")


def play(tests: ModuleType, cluster: Any, client: openai.OpenAI, whole: dict[str, Any], args: Any) -> Counter[str]:
    """Play all rounds; returns the counts."""
    rng, counts, pauses = random.Random(args.seed), Counter[str](), [0.0]
    for number in range(args.rounds):
        pids = pids_of(tests, cluster, args.role)
        told = {kind: tests.Told() for kind in tests.KINDS}
        threads = [threading.Thread(target=tests.listen, args=(client, kind, one)) for kind, one in told.items()]
        for thread in threads:
            thread.start()
        time.sleep(rng.random() * args.within_s)
        victim = pids[rng.choice(sorted(pids))]
        os.kill(victim, signal.SIGKILL if args.how == "kill" else signal.SIGSTOP)
        for thread in threads:
            thread.join(tests.PATIENCE_S)
        if args.how == "freeze":
            with contextlib.suppress(ProcessLookupError):  # the supervisor has replaced it, or is about to
                os.kill(victim, signal.SIGCONT)
        for kind, one in told.items():
            counts["streams"] += 1
            if one.error is not None:
                counts["failed"] += 1
                print(f"round {number}, {kind}: {one.error}", flush=True)
                continue
            facts = tests.facts_of(cluster, f"/v1/requests/{one.name}/explain")
            resumed = any(any(dispatch["resumed_tokens"]) for dispatch in facts["dispatches"])
            counts["resumed"] += resumed
            counts["sent again without output"] += len(facts["dispatches"]) > 1 and not resumed
            if resumed:
                pauses.append(facts["itl_ms"]["max"])
            if one.said != whole[kind].said:
                counts["differ"] += 1
                print(f"round {number}, {kind} differs: {facts['dispatches']}", flush=True)
    pauses.sort()
    counts["median pause ms"], counts["longest pause ms"] = round(pauses[len(pauses) // 2]), round(pauses[-1])
    return counts


class Heard:
    """What the client of one stream heard, and when."""

    def __init__(self) -> None:
        self.text = ""
        self.name = ""
        self.times_s: list[float] = []
        self.error: Exception | None = None
        self.begun = threading.Event()

    def listen(self, client: openai.OpenAI, prompt: list[int], num_tokens: int) -> None:
        """Ask for a stream and read it."""
        try:
            stream = client.completions.create(
                model="twostroke-bundled",
                prompt=prompt,
                max_tokens=num_tokens,
                temperature=0,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            for chunk in stream:
                self.name = chunk.id
                self.text += chunk.choices[0].text if chunk.choices else ""
                self.times_s.append(time.monotonic())
                if len(self.times_s) >= BEFORE:
                    self.begun.set()
        except Exception as error:
            self.error = error
        self.begun.set()

    def pause_ms(self, since_s: float) -> float:
        """The longest time between two pieces, the later one after `since_s`."""
        pairs = zip(self.times_s, self.times_s[1:], strict=False)
        return max((1e3 * (later - one) for one, later in pairs if later > since_s), default=0.0)

    def median_gap_ms(self) -> float:
        """Median time between two pieces."""
        return 1e3 * statistics.median(b - a for a, b in zip(self.times_s, self.times_s[1:], strict=False))


def decoders(tests: Any, cluster: Any, count: int) -> dict[str, int]:
    """Pids of the workers that decode, once all are live."""
    end_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < end_s:
        workers = tests.facts_of(cluster)["workers"]
        if len(workers) == count and all(worker["state"] == "live" for worker in workers):
            return {worker["worker_id"]: worker["pid"] for worker in workers if worker["role"] != "prefill"}
        time.sleep(0.05)
    raise SystemExit("the cluster did not become whole")


def lived_on_s(pid: int, since_s: float) -> float:
    """How long a process lives after a signal."""
    while time.monotonic() < since_s + PATIENCE_S:
        try:
            os.kill(pid, 0)
            with open(f"/proc/{pid}/stat") as stat:
                if stat.read().rsplit(")", 1)[1].split()[0] == "Z":
                    break
        except (ProcessLookupError, FileNotFoundError):
            break
        time.sleep(0.005)
    return time.monotonic() - since_s


def trial(tests: Any, cluster: Any, client: openai.OpenAI, prompt: list[int], args: Any) -> tuple[float, bool]:
    """One disturbed stream; returns its pause in ms, and whether it said what it says undisturbed."""
    pids = decoders(tests, cluster, 2 + args.prefill)
    heard, again = Heard(), Heard()
    thread = threading.Thread(target=heard.listen, args=(client, prompt, NUM_TOKENS))
    thread.start()
    heard.begun.wait(PATIENCE_S)
    victim = tests.facts_of(cluster, f"/v1/requests/{heard.name}/explain")["decode_worker"]
    time.sleep(args.later_s)
    since_s = time.monotonic()
    os.kill(pids[victim], signal.SIGTERM if args.how == "drain" else signal.SIGKILL)
    lived_s = lived_on_s(pids[victim], since_s)
    thread.join(PATIENCE_S)
    facts = tests.facts_of(cluster, f"/v1/requests/{heard.name}/explain")
    decoders(tests, cluster, 2 + args.prefill)
    again.listen(client, prompt, NUM_TOKENS)
    is_equal = heard.error is None and again.error is None and heard.text == again.text
    last, report = facts["dispatches"][-1], facts["handover"]
    print(
        f"pause {heard.pause_ms(since_s):.0f} ms, equal {is_equal}, after {last['resumed_tokens']} tokens, "
        f"fetched {last.get('fetched')}, held there {report['tokens_held']}, moved {report['tokens_moved']}, "
        f"computed there {report['recomputed_tokens']}, lived on {lived_s:.2f} s",
        flush=True,
    )
    return heard.pause_ms(since_s), is_equal and len(facts["dispatches"]) > 1


def undisturbed(client: openai.OpenAI, prompts: list[list[int]]) -> float:
    """Streams at once; returns the mean of their median times between tokens, in ms."""
    heard = [Heard() for _ in prompts]
    threads = [
        threading.Thread(target=one.listen, args=(client, prompt, NUM_TOKENS))
        for one, prompt in zip(heard, prompts, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    return statistics.fmean(one.median_gap_ms() for one in heard)


def measure_pauses(words: list[str]) -> int:
    """Run one kind of trial."""
    parser = argparse.ArgumentParser(prog="bench/resume.py pauses")
    parser.add_argument("--how", choices=["drain", "kill", "none"], default="drain")
    parser.add_argument("--journal", action="store_true")
    parser.add_argument("--prefill", type=int, default=0)
    parser.add_argument("--context", type=int, default=3000)
    parser.add_argument("--trials", type=int, default=6)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument(
        "--later-s", type=float, default=0.0, help="how much later than the 40th token the signal comes"
    )
    args = parser.parse_args(words)
    tests, clusters = load(ROOT / "tests/system/test_resume.py"), load(ROOT / "tests/system/conftest.py")
    flags: dict[str, Any] = {"cluster__launcher": "process", "cluster__prefill": args.prefill, "cluster__decode": 2}
    flags |= {"step__num_threads": 1, "cache__tokens": 32768, "cluster__drain_timeout_s": GRACE_S}
    if args.journal:
        flags |= {"router__kv_journal": "buddy"}
    rng = random.Random(1)
    with (
        clusters.running_cluster(**flags) as cluster,
        openai.OpenAI(base_url=cluster.url + "/v1", api_key="none", max_retries=0, timeout=PATIENCE_S) as client,
    ):
        decoders(tests, cluster, 2 + args.prefill)
        prompts = [[rng.randrange(10, VOCABULARY) for _ in range(args.context)] for _ in range(args.trials)]
        if args.how == "none":
            gaps = []
            for _ in prompts:
                some = [[rng.randrange(10, VOCABULARY) for _ in range(args.context)] for _ in range(args.streams)]
                gaps.append(undisturbed(client, some))
            print(f"none, journal {args.journal}: ms between tokens {[round(gap, 3) for gap in gaps]}")
            print(f"median {statistics.median(gaps):.3f}")
            return 0
        Heard().listen(client, prompts[0][:64], 16)  # so that the first trial does not pay for the first request
        told = [trial(tests, cluster, client, prompt, args) for prompt in prompts]
    pauses = [pause_ms for pause_ms, _ in told]
    median, spread = statistics.median(pauses), f"{min(pauses):.0f} to {max(pauses):.0f}"
    what = f"{args.how}, journal {args.journal}, {args.context} tokens"
    print(f"{what}: median {median:.0f} ms ({spread})")
    return int(not all(is_right for _, is_right in told))


def main() -> int:
    """Run one campaign, or one kind of trial."""
    if sys.argv[1:2] == ["pauses"]:
        return measure_pauses(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--role", choices=["decode", "prefill"], default="decode")
    parser.add_argument("--how", choices=["kill", "freeze"], default="kill")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--within-s", type=float, default=1.5, help="the loss comes within so many seconds")
    args = parser.parse_args()
    tests, clusters = load(ROOT / "tests/system/test_resume.py"), load(ROOT / "tests/system/conftest.py")
    flags = {"cluster__launcher": "process", "cluster__prefill": 2, "cluster__decode": 2, "step__num_threads": 1}
    flags |= {"cache__tokens": 16384, "router__local_prefill": False}
    with (
        clusters.running_cluster(**flags) as cluster,
        openai.OpenAI(base_url=cluster.url + "/v1", api_key="none", max_retries=0, timeout=tests.PATIENCE_S) as client,
    ):
        pids_of(tests, cluster, args.role)
        whole = {kind: tests.Told() for kind in tests.KINDS}
        for kind, one in whole.items():
            tests.listen(client, kind, one)
            assert one.error is None, (kind, one.error)
        counts = play(tests, cluster, client, whole, args)
    print(f"{args.role}, {args.how}, {args.rounds} rounds, seed {args.seed}: {dict(counts)}")
    return int(bool(counts["failed"] or counts["differ"]))


if __name__ == "__main__":
    sys.exit(main())
