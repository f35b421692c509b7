"""How long `twostroke serve` takes until it serves, and what each of its processes computes until then.

    python bench/starts/startup.py --times 5
    python bench/starts/startup.py --times 5 --beside ../other/src    # in turn with another tree's `src` folder

Every turn runs the commands of COMMANDS and one start per tree; the kernels must be built before (`make setup`). CPU
seconds are user and system time of a process with all its threads and ended children, read when the cluster serves:
unlike seconds of the clock, they change little when the machine is busy.
"""

from __future__ import annotations

import argparse
import os
import re
import selectors
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from report import machine, save, spread, table

ROOT = Path(__file__).resolve().parents[2]
UP = b"Ctrl-C drains and stops."
GIVE_UP_S = 180.0
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
NOBODY = "127.0.0.1:1"  # an address at which no cluster answers
COMMANDS = (["--help"], ["status", "--grpc", NOBODY], ["chat", "--grpc", NOBODY])
CLUSTER = ["serve", "--launcher", "process", "--prefill", "1", "--decode", "1"]

Seconds = dict[str, dict[str, list[float]]]
"""By what was measured, then "wall" or "cpu": one value per turn."""


def command(words: list[str]) -> list[str]:
    """The command line of this interpreter's `twostroke`."""
    return [sys.executable, "-P", "-m", "twostroke.cli.main", *words]


def environment(source: Path) -> dict[str, str]:
    """Environment in which `twostroke` is that of a tree, with compiled bytecode as after an installation."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return kept | {"PYTHONPATH": str(source)}


def one_command(words: list[str], source: Path) -> tuple[float, float]:
    """Wall and CPU seconds of one command, of which nobody answers."""
    before, began_s = os.times(), time.monotonic()
    options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run(command(words), env=environment(source), timeout=GIVE_UP_S, check=False, **options)
    after = os.times()
    cpu_s = after.children_user + after.children_system - before.children_user - before.children_system
    return time.monotonic() - began_s, cpu_s


def one_start(source: Path, port: int) -> tuple[float, dict[str, float]]:
    """Start a cluster, and end it when it serves: wall seconds until then, and CPU seconds by process."""
    words = [*CLUSTER, "--port", str(port), "--grpc-port", str(port + 1)]
    began_s = time.monotonic()
    server = subprocess.Popen(
        command(words), env=environment(source), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        wait_until_up(server, began_s + GIVE_UP_S)
        wall_s = time.monotonic() - began_s
        return wall_s, cpu_by_process(server.pid)
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(GIVE_UP_S)


def wait_until_up(server: subprocess.Popen[bytes], until_s: float) -> None:
    """Read the output up to the line that says how to stop."""
    assert server.stdout is not None
    said = b""
    with selectors.DefaultSelector() as selector:
        selector.register(server.stdout, selectors.EVENT_READ)
        while UP not in said:
            if not selector.select(max(0.0, until_s - time.monotonic())):
                raise SystemExit(f"not up within {GIVE_UP_S:g} s")
            read = os.read(server.stdout.fileno(), 1 << 16)
            if not read:
                raise SystemExit(f"it ended instead of serving; run it by hand: {' '.join(CLUSTER)}")
            said += read


def cpu_by_process(server_pid: int) -> dict[str, float]:
    """CPU seconds so far of the server and of each member: its own and of what it has started and awaited."""
    found = {"serve (supervisor)": cpu_s(server_pid)}
    for child in Path(f"/proc/{server_pid}/task/{server_pid}/children").read_text().split():
        words = Path(f"/proc/{child}/cmdline").read_bytes().decode().split("\0")
        role = words[words.index("--role") + 1] + " " if "--role" in words else ""
        kind = next((word for word in words if word in ("worker", "router")), words[0])
        found[f"{role}{kind}"] = cpu_s(int(child))
    return found | {"all processes": sum(found.values())}


def cpu_s(pid: int) -> float:
    """User and system time of a process, with its threads and its ended children (proc(5): fields 14 to 17)."""
    fields = re.sub(r"^.*\) ", "", Path(f"/proc/{pid}/stat").read_text()).split()
    return sum(int(field) for field in fields[11:15]) / TICKS_PER_S


def main() -> None:
    """Measure in turn, print and save a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--beside", type=Path, help="`src` folder of another tree")
    parser.add_argument("--port", type=int, default=26900)
    parser.add_argument("--save", default="startup", help="name of the result; empty: only print it")
    given = parser.parse_args()
    facts, measured = machine(), defaultdict[str, Seconds](lambda: defaultdict(lambda: defaultdict(list)))
    trees = {"this tree": ROOT / "src"} | ({"beside": given.beside.resolve()} if given.beside else {})
    for turn in range(-1, given.times):  # the first turn compiles bytecode and fills the system's cache of files
        for tree, source in trees.items():
            kept = measured[tree] if turn >= 0 else defaultdict(lambda: defaultdict(list))
            for words in COMMANDS:
                wall_s, seconds = one_command(words, source)
                kept[f"`twostroke {words[0]}`"]["wall"].append(wall_s)
                kept[f"`twostroke {words[0]}`"]["cpu"].append(seconds)
            wall_s, by_process = one_start(source, given.port)
            kept["all processes"]["wall"].append(wall_s)
            for process, seconds in by_process.items():
                kept[process]["cpu"].append(seconds)
            print(f"{tree}: up after {wall_s:.2f} s, {by_process}", flush=True)
    rows = [
        (tree, what, spread(of["cpu"]), spread(of["wall"]) if of["wall"] else "")
        for tree, found in measured.items()
        for what, of in found.items()
    ]
    body = table(("tree", "what", "CPU s", "wall s"), rows)
    walls = {tree: statistics.median(found["all processes"]["wall"]) for tree, found in measured.items()}
    body += "\n\nMedian and range of " + f"{given.times} turns. Until it serves: "
    body += ", ".join(f"{tree} {wall_s:.2f} s" for tree, wall_s in walls.items()) + "."
    print(body)
    if given.save:
        print(save(given.save, f"Start of `twostroke {' '.join(CLUSTER)}`", body, {"measured": measured}, facts))


if __name__ == "__main__":
    main()
