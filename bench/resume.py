"""How streams fare while their workers are killed and frozen at random moments, through the official client.

    python bench/resume.py [--role decode|prefill] [--how kill|freeze] [--rounds 100] [--seed 1]

Each round runs one stream of every kind (tests/system/test_resume.py) on two prefill and two decode workers of the
bundled model, as processes, and kills or freezes one worker of the role at a random moment. Counted: streams whose
text, reasons, logprobs and usage equal the undisturbed run's; streams that went on at another worker; their longest
pause, as `explain` tells it. Exit status 1: a stream differed or failed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import openai

ROOT = Path(__file__).resolve().parents[1]


def load(path: Path) -> ModuleType:
    """A module of the tests, by its file."""
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


def main() -> int:
    """Run one campaign."""
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
