"""Goodput of one router under 0.5 to 10 times the capacity of its workers, and what a refusal costs.

    python bench/overload.py [--seconds 60] [--rounds 3] [--loads 0.5,0.8,1,1.2,3,10]

The router is a process of its own, as users run it; two stub workers with a fixed step curve are another one, and this
process sends the load (load_generators/open_loop.py). Good: answered whole within the deadline, from when the request
was due. The cost of a refusal is the router's CPU time in a run in which every request is refused, per request: by a
key whose quota is used up, and by a full queue.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "load_generators"))
from open_loop import Generator, Result, Target, poisson
from report import machine, save, table
from stub_workers import Curve

from twostroke.core.ports import free_ports
from twostroke.router.keys.digests import line_for

HERE = Path(__file__).resolve().parent
KEY, SPENT = "sk-key-of-the-benchmark", "sk-key-whose-quota-is-spent"
KEYS = f"""keys:
  - {{key: '{line_for(KEY)}', monitor: true}}
  - {{key: '{line_for(SPENT)}', requests_per_minute: 0.001}}
"""
READY_S = 60.0


@dataclass(frozen=True)
class Served:
    """A router with stub workers."""

    url: str
    router_pid: int

    def cpu_s(self) -> float:
        """CPU time of the router until now."""
        fields = Path(f"/proc/{self.router_pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory_mib(self) -> float:
        """Resident memory of the router now."""
        pages = int(Path(f"/proc/{self.router_pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@contextlib.contextmanager
def served(curve: Curve, num_workers: int, ports: int | None, **settings: Any) -> Iterator[Served]:
    """A router process and a process of stub workers. `ports`: the first of three; None: any."""
    port, grpc_port, internal = [ports, ports + 1, ports + 2] if ports else free_ports("127.0.0.1", 3)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        keys = Path(folder) / "keys.yaml"
        keys.write_text(KEYS)
        values = {"port": port, "grpc_port": grpc_port, "internal_port": internal, "api_key_file": keys, **settings}
        environment = os.environ | {f"TWOSTROKE__ROUTER__{name.upper()}": str(value) for name, value in values.items()}
        environment["TWOSTROKE__CLUSTER__KEY"] = "the key of this benchmark's cluster"
        address = f"127.0.0.1:{internal}"
        stub = [HERE / "load_generators" / "stub_workers.py", address, "--workers", str(num_workers)]
        flags = {"--seats": curve.seats, "--step-ms": curve.step_ms, "--seq-ms": curve.seq_ms}
        commands = [
            [sys.executable, "-P", "-m", "twostroke.cli.main", "router"],
            [sys.executable, *map(str, stub), *(str(word) for pair in flags.items() for word in pair)],
        ]
        processes = []
        for number, command in enumerate(commands):
            log = stack.enter_context((Path(folder) / f"{number}.log").open("w"))
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        try:
            url = f"http://127.0.0.1:{port}"
            _await_ready(url, processes, Path(folder))
            yield Served(url, processes[0].pid)
        finally:
            for process in reversed(processes):
                process.terminate()
                process.wait(30)


def _await_ready(url: str, processes: list[subprocess.Popen[bytes]], folder: Path) -> None:
    end_s = time.monotonic() + READY_S
    while time.monotonic() < end_s and all(process.poll() is None for process in processes):
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            if answer.status == 200:
                return
        time.sleep(0.2)
    said = "\n".join(log.read_text()[-2000:] for log in sorted(folder.glob("*.log")))
    raise SystemExit(f"the router was not ready within {READY_S:g} s:\n{said}")


def load(there: Served, rate_per_s: float, args: argparse.Namespace, seed: int, key: str = KEY) -> Result:
    """One run at a fixed rate."""
    dues = poisson(rate_per_s, args.seconds, (args.prompt_tokens, args.output_tokens), seed)
    target = Target(there.url, deadline_s=args.deadline, api_key=key)
    return asyncio.run(Generator(target, seed).run(dues, args.seconds))


def goodput(there: Served, capacity: float, args: argparse.Namespace) -> dict[float, list[dict[str, float]]]:
    """Figures of all rounds, by load relative to the capacity."""
    found: dict[float, list[dict[str, float]]] = {share: [] for share in args.loads}
    for number in range(args.rounds):
        for share in args.loads:
            before_s = there.cpu_s()
            result = load(there, share * capacity, args, 1 + number)
            figures = result.figures(min(args.deadline, args.seconds / 4))
            figures["router_cpu_share"] = (there.cpu_s() - before_s) / args.seconds
            figures["router_memory_mib"] = there.memory_mib()
            found[share].append(figures)
            told = ", ".join(f"{name} {value:.1f}" for name, value in figures.items() if value)
            print(f"round {number + 1}, {share:g} x capacity: {told}", flush=True)
            time.sleep(args.deadline / 2)  # what still waits runs out
    return found


def refusals(args: argparse.Namespace, curve: Curve) -> dict[str, dict[str, float]]:
    """CPU time and latency of refusals: by a spent quota, and by a full queue."""
    found = {}
    for name, key, settings in (("quota", SPENT, {}), ("full queue", KEY, {"max_running": 1})):
        with served(curve, 1, args.ports, **settings) as there:
            load(there, 20.0, argparse.Namespace(**{**vars(args), "seconds": 1.0}), 1, key)  # loads the tokenizer
            holding = None
            if key is KEY:  # one request that fills it
                holding = _hold(there, args)
            before_s = there.cpu_s()
            result = load(there, args.refusals_per_s, argparse.Namespace(**{**vars(args), "seconds": 10.0}), 2, key)
            spent_s = there.cpu_s() - before_s
            figures = result.figures()
            figures["cpu_ms_per_refusal"] = spent_s * 1e3 / max(1.0, figures["refused"])
            found[name] = figures
            if holding is not None:
                holding.kill()
        print(f"refused by {name}: {figures['cpu_ms_per_refusal']:.3f} ms of CPU, {figures}", flush=True)
    return found


def _hold(there: Served, args: argparse.Namespace) -> subprocess.Popen[bytes]:
    """A request that runs for the whole measurement."""
    body = '{"prompt": [300], "max_tokens": 4000, "ignore_eos": true}'
    head = ["-H", f"authorization: Bearer {KEY}", "-H", "content-type: application/json"]
    command = ["curl", "-s", f"{there.url}/v1/completions", *head, "-d", body]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    time.sleep(1.0)
    return process


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="of one run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--loads", type=_numbers, default="0.5,0.8,1,1.2,3,10", help="relative to the capacity")
    parser.add_argument("--deadline", type=float, default=4.0)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--seats", type=int, default=Curve.seats, help="of each worker")
    parser.add_argument("--step-ms", type=float, default=Curve.step_ms)
    parser.add_argument("--only", choices=("goodput", "refusals"))
    parser.add_argument("--refusals-per-s", type=float, default=300.0)
    parser.add_argument("--ports", type=int, help="the first of three ports; default: any")
    args = parser.parse_args()
    facts, curve, num_workers = machine(), Curve(args.step_ms, seats=args.seats), 2
    capacity = num_workers * curve.capacity_per_s(args.prompt_tokens, args.output_tokens)
    print(f"capacity by the step curve: {capacity:.1f} requests/s", flush=True)
    if args.only == "refusals":
        refusals(args, curve)
        return
    with served(curve, num_workers, args.ports) as there:
        found = goodput(there, capacity, args)
    if args.only:
        return
    costs = refusals(args, curve)
    middle = {share: {k: statistics.median(f[k] for f in runs) for k in runs[0]} for share, runs in found.items()}
    peak = max(figures["good_per_s"] for figures in middle.values())
    names = [
        *("offered_per_s", "good_per_s", "late_answers", "refused", "expired", "failed", "without_retry_after"),
        *("answer_p99_ms", "refusal_p50_ms", "refusal_p99_ms", "sent_late_p99_ms", "router_cpu_share"),
        "router_memory_mib",
    ]
    rows = [
        [f"{share:g} ×", f"{100 * figures['good_per_s'] / peak:.1f} %", *(f"{figures[name]:.1f}" for name in names)]
        for share, figures in middle.items()
    ]
    cost_rows = [
        [name, *(f"{figures[key]:.3g}" for key in ("cpu_ms_per_refusal", "refusal_p50_ms", "refusal_p99_ms"))]
        for name, figures in costs.items()
    ]
    body = (
        f"{num_workers} stub workers of {curve.seats} seats: {capacity:.1f} requests/s of {args.prompt_tokens} prompt "
        f"and {args.output_tokens} new tokens, deadline {args.deadline:g} s, {args.seconds:g} s per run, medians of "
        f"{args.rounds} rounds.\n\n{table(['load', 'of peak', *names], rows)}\n\n"
        f"{table(['refused by', 'CPU ms', 'p50 ms', 'p99 ms'], cost_rows)}"
    )
    print(body, save("overload", "Goodput under overload", body, {"loads": found, "refusals": costs}, facts), sep="\n")


if __name__ == "__main__":
    main()
