"""Interrupts `twostroke serve` at random moments of its start: how long it takes to end, and what it leaves behind.

    python bench/starts/interrupts.py --launcher process --times 30
    python bench/starts/interrupts.py --launcher ray --times 30
    python bench/starts/interrupts.py --launcher process --times 10 --compile     # with an empty cache of kernels

Right is: over within 2 s, exit status 130 (143 after SIGTERM), no process, no temporary file, no half-built library, no
lock held. Every run has a temporary folder and a mark in its environment of its own, by which what is left is found.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

MARK = "INTERRUPTED_START"
WITHIN_S = 2.0
GIVE_UP_S = 30.0
SECOND_S = 0.2  # between the two signals to a cluster that serves
SERVING = "draining, asked twice"
UP = "Ctrl-C drains and stops."
PHASES = {  # what the output says when the phase begins
    "compiling": "compiling native kernels",
    "members on their way": "starting",
    "waiting for the worker": "router-0 is ready",
    SERVING: UP,
}


@dataclass(frozen=True)
class Ended:
    """One interrupted start."""

    after_s: float
    phase: str
    seconds: float
    code: int | None
    left: tuple[str, ...]

    def is_right(self, number: int) -> bool:
        """Whether it kept the promise."""
        wanted = {128 + number, -number} if self.phase == "imports" else {128 + number}
        wanted = {0, *wanted} if self.phase == SERVING else wanted  # it may have drained before the second one
        return self.code in wanted and not self.left and self.seconds <= WITHIN_S


@dataclass(frozen=True)
class Start:
    """What is started, and where it may write."""

    launcher: str
    folder: Path
    cache: Path
    port: int


def interrupted(start: Start, after_s: float, number: int) -> Ended:
    """Start, wait `after_s`, send the signal, look."""
    mark, folder, cache, port = secrets.token_hex(8), start.folder, start.cache, start.port
    environment = os.environ | {MARK: mark, "TMPDIR": str(folder), "XDG_CACHE_HOME": str(cache)}
    command = [str(Path(sys.executable).with_name("twostroke")), "serve", "--launcher", start.launcher]
    command += ["--prefill", "0", "--decode", "1", "--port", str(port), "--grpc-port", str(port + 1)]
    output = folder.parent / "output"
    with output.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)
    time.sleep(after_s)
    said = output.read_text()
    phase = next((name for name, words in reversed(PHASES.items()) if words in said), "imports")
    began_s = time.monotonic()
    process.send_signal(number)
    if phase == SERVING:
        time.sleep(SECOND_S)
        process.send_signal(number)
    try:
        code: int | None = process.wait(GIVE_UP_S)
    except subprocess.TimeoutExpired:
        code = None
    seconds = time.monotonic() - began_s
    left = (*processes(mark), *files(folder), *unfinished(cache))
    if code is None:
        process.kill()
    if code not in (0, 130, 143) or left:
        print(output.read_text()[-1500:], file=sys.stderr)
    return Ended(after_s, phase, seconds, code, left)


def processes(mark: str) -> list[str]:
    """Those that bear the mark."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (entry / "environ").read_bytes():
                found.append("process " + (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:80])
        except OSError:
            continue
    return found


def files(folder: Path) -> list[str]:
    """What lies in the temporary folder; it is emptied for the next run."""
    found = [str(path.relative_to(folder)) for path in folder.iterdir()]
    for path in folder.iterdir():
        shutil.rmtree(path, ignore_errors=True)
    return found


def unfinished(cache: Path) -> list[str]:
    """Of kernels: what is half built, and a lock that is held."""
    found = [path.name for path in cache.glob("twostroke/kernels/*") if path.suffix not in (".so", "")]
    for lock in cache.glob("twostroke/kernels/lock"):
        with lock.open("r+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                found.append("a held lock")
    return found


def main() -> None:
    """Parse, run, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--launcher", choices=("process", "ray", "inprocess"), default="process")
    parser.add_argument("--times", type=int, default=30)
    parser.add_argument("--longest-s", type=float, default=12.0, help="the latest moment")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--port", type=int, default=18900)
    parser.add_argument("--compile", action="store_true", help="with an empty cache of kernels each time")
    parser.add_argument("--signal", choices=("SIGINT", "SIGTERM"), default="SIGINT")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    number, moments = signal.Signals[given.signal], random.Random(given.seed)
    folder = Path(tempfile.mkdtemp(prefix="int-"))
    own_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    ends = []
    try:
        for turn in range(given.times):
            (folder / "tmp").mkdir(exist_ok=True)
            cache = folder / f"cache-{turn}" if given.compile else own_cache
            after_s = moments.uniform(0.05, given.longest_s)
            start = Start(given.launcher, folder / "tmp", cache, given.port + turn % 20 * 2)
            end = interrupted(start, after_s, number)
            ends.append(end)
            verdict = "" if end.is_right(number) else "WRONG"
            print(
                f"{end.after_s:6.2f} s  {end.phase:24} over after {end.seconds:5.2f} s, status {end.code}  {verdict}"
                f"{', '.join(end.left)}",
                flush=True,
            )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for phase, count in Counter(end.phase for end in ends).items():
        of_phase = [end for end in ends if end.phase == phase]
        longest_s, wrong = max(end.seconds for end in of_phase), sum(not end.is_right(number) for end in of_phase)
        print(f"| {given.launcher} | {given.signal} | {phase} | {count} | {longest_s:.2f} s | {wrong} |")
    if given.out:
        given.out.write_text(json.dumps([vars(end) for end in ends], indent=1))
    sys.exit(any(not end.is_right(number) for end in ends))


if __name__ == "__main__":
    main()
