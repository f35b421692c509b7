"""`python bench/gpu/serve.py [--device auto|cpu|cuda]`: the bundled model, served as its user would, is checked.

Starts `twostroke serve` with one prefill and one decode worker, asks over HTTP and by the SDK, streams, cancels, sees
all blocks come back and Ctrl-C end it. Then asks the same of one combined worker. Greedy texts asked one at a time
must be equal. Asked all at once they must be on a CPU; on a GPU cuBLAS chooses by the number of rows, so there it is a
fact that is reported. No speed is measured. Needs the parts of `twostroke[engine,serve]`; no Ray.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from twostroke import Client

READY_S, STOP_S, ANSWER_S = 110.0, 20.0, 60.0
LONG = "import os\nimport re\n\n\n" + "".join(
    f"def words_{i}(path):\n    return open(path).read()\n\n\n" for i in range(20)
)
PROMPTS = (
    "def add(a, b):", "import os\n\n", "class Stack:\n", "x", "def first_line(path):\n    with open(path) as file:\n",
    LONG + "def count(path):", LONG + "def last(path):",
)  # fmt: skip
QUESTIONS = ("Hello!", "What does os.path.join do?", "Thanks!")
MAX_TOKENS = 40


class Faces(NamedTuple):
    """Where a cluster listens."""

    http: str
    grpc: str


@contextlib.contextmanager
def served(device: str, *flags: str) -> Iterator[tuple[Faces, str]]:
    """`twostroke serve` with these flags, up and serving, and what its workers compute with; Ctrl-C at the end.

    Raises:
        RuntimeError: it was not ready in time, or did not end with 0 in time.
    """
    settings = {"MODEL__DEVICE": device, "ROUTER__LOCAL_PREFILL": "false", "CACHE__PREFIX_CACHING": "false"}
    environment = os.environ | {f"TWOSTROKE__{name}": value for name, value in settings.items()}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (sys.path[0], os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-P", "-m", "twostroke.cli.main", "serve", "--launcher", "process"]
    process = subprocess.Popen(
        [*command, "--port", "0", "--grpc-port", "0", *flags],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
    )  # fmt: skip
    said: list[str] = []
    reader = threading.Thread(target=said.extend, args=(process.stdout,), daemon=True)
    reader.start()
    try:
        faces = _await_faces(process, said)
        numerics = sorted({worker["numerics"] for worker in ask(faces, "/v1/cluster")["workers"]})
        yield faces, " | ".join(numerics)
        process.send_signal(signal.SIGINT)
        if (code := process.wait(STOP_S)) != 0:
            raise RuntimeError(f"serve ended with {code}")
    except BaseException:
        print("".join(said[-40:]))
        raise
    finally:
        with contextlib.suppress(subprocess.TimeoutExpired):  # a last chance to take its workers along
            process.terminate()
            process.wait(STOP_S)
        process.kill()
        reader.join(1.0)


def _await_faces(process: subprocess.Popen[str], said: list[str]) -> Faces:
    """Both addresses, as the greeting names them to people."""
    end_s = time.monotonic() + READY_S
    while time.monotonic() < end_s and process.poll() is None:
        text = "".join(said)
        http, grpc = re.search(r"curl (http://\S+)/v1/", text), re.search(r"chat --grpc (\S+)", text)
        if http and grpc:
            return Faces(http[1], grpc[1])
        time.sleep(0.05)
    raise RuntimeError(f"not ready within {READY_S:g} s (exit code {process.poll()})")


def ask(faces: Faces, path: str, body: dict[str, Any] | None = None) -> Any:
    """One HTTP call; of a stream the texts of its pieces, joined."""
    data = None if body is None else json.dumps(body | {"temperature": 0, "max_tokens": MAX_TOKENS}).encode()
    request = urllib.request.Request(faces.http + path, data, {"content-type": "application/json"})
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # this machine, whatever the environment says
    with direct.open(request, timeout=ANSWER_S) as answer:
        if not (body or {}).get("stream"):
            return json.loads(answer.read())
        events = [line[6:].strip() for line in answer if line.startswith(b"data: ")]
    assert events.pop() == b"[DONE]", "a stream must end with [DONE]"
    return "".join(choice["text"] for event in events for choice in json.loads(event)["choices"])


def asking(faces: Faces, client: Client, model: str) -> dict[str, Callable[[], str]]:
    """Every request of a round, by name."""

    def completion(prompt: str) -> Callable[[], str]:
        body = {"model": model, "prompt": prompt}
        return lambda: str(ask(faces, "/v1/completions", body)["choices"][0]["text"])

    def stream(prompt: str) -> Callable[[], str]:
        return lambda: str(ask(faces, "/v1/completions", {"model": model, "prompt": prompt, "stream": True}))

    def chat(question: str) -> Callable[[], str]:
        body = {"model": model, "messages": [{"role": "user", "content": question}]}
        return lambda: str(ask(faces, "/v1/chat/completions", body)["choices"][0]["message"]["content"])

    def sdk(prompt: str) -> Callable[[], str]:
        return lambda: client.generate(prompt, temperature=0, max_tokens=MAX_TOKENS).text

    asked = {f"completion {i}": completion(prompt) for i, prompt in enumerate(PROMPTS)}
    asked |= {f"stream {i}": stream(prompt) for i, prompt in enumerate(PROMPTS[:3])}
    asked |= {f"chat {i}": chat(question) for i, question in enumerate(QUESTIONS)}
    return asked | {f"SDK {i}": sdk(prompt) for i, prompt in enumerate(PROMPTS)}


def cancelled(client: Client) -> bool:
    """Whether a stream gives pieces and can be left in their midst."""
    with client.generate_stream(LONG, temperature=0, max_tokens=1000, ignore_eos=True) as pieces:
        return all(next(pieces) is not None for _ in range(3))


def all_free(faces: Faces) -> bool:
    """Whether every block of every worker comes back within seconds."""
    end_s = time.monotonic() + 10.0
    while time.monotonic() < end_s:
        workers = ask(faces, "/v1/cluster")["workers"]
        if all(w["blocks"]["free"] == w["blocks"]["total"] and w["load"]["running"] == 0 for w in workers):
            return True
        time.sleep(0.1)
    return False


class Round(NamedTuple):
    """What one cluster answered."""

    one_at_a_time: dict[str, str]
    all_at_once: dict[str, str]
    facts: dict[str, bool]
    numerics: str


def round_of(device: str, *flags: str) -> Round:
    """Ask everything of one cluster."""
    with served(device, *flags) as (faces, numerics), Client(faces.grpc, timeout_s=ANSWER_S) as client:
        asked = asking(faces, client, ask(faces, "/v1/models")["data"][0]["id"])
        single = {name: run() for name, run in asked.items()}
        with ThreadPoolExecutor(len(asked)) as threads:
            futures = {name: threads.submit(run) for name, run in asked.items()}
            together = {name: future.result(2 * ANSWER_S) for name, future in futures.items()}
        facts = {"a stream was cancelled": cancelled(client), "all blocks came back": all_free(faces)}
    return Round(single, together, facts | {"Ctrl-C ended it with 0": True}, numerics)


def main() -> int:
    """Return 0 where everything that must hold did."""
    parser = argparse.ArgumentParser(prog="python bench/gpu/serve.py", description=__doc__)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    device = parser.parse_args().device
    apart = round_of(device, "--prefill", "1", "--decode", "1")
    whole = round_of(device, "--prefill", "0", "--decode", "1")
    print(f"two workers: {apart.numerics}\none worker: {whole.numerics}\n")
    is_cpu = "triton" not in apart.numerics
    good = True
    for name, expected in whole.one_at_a_time.items():
        single, together = (texts[name] == expected for texts in (apart.one_at_a_time, apart.all_at_once))
        good &= single and (together or not is_cpu) and bool(expected)
        print(f"{name:<14} one at a time {_equal(single)}  all at once {_equal(together)}  {expected[:48]!r}")
        if not single:
            print(f"  in one piece {expected!r}\n  apart        {apart.one_at_a_time[name]!r}")
    for label, found in (("two workers", apart), ("one worker", whole)):
        for fact, holds in found.facts.items():
            good &= holds
            print(f"{label}: {fact}: {'yes' if holds else 'NO'}")
    print("right" if good else "WRONG")
    return 0 if good else 1


def _equal(is_equal: bool) -> str:
    return "equal    " if is_equal else "different"


if __name__ == "__main__":
    sys.exit(main())
