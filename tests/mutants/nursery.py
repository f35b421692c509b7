"""Runs pytest again and again over one copy of the tree, each time in a fork of a process that has the libraries.

Importing torch, gRPC and the like takes seconds of a run whose tests take one; nothing of the copy is imported before
the fork. Asks come as JSON lines (words for pytest, and seconds). So do answers: what failed; empty if nothing did.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

LIBRARIES = ("grpc.aio", "httpx", "hypothesis.stateful", "jinja2", "numpy", "prometheus_client", "pydantic", "pytest")
LIBRARIES += ("anthropic", "ollama", "openai", "redis.asyncio", "tritonclient.grpc.aio")  # take seconds on a busy core
LIBRARIES += ("pytest_asyncio", "starlette.applications", "tokenizers", "torch", "triton", "typer.testing", "uvicorn")


def main() -> None:
    """Answer until nobody asks any more. The copy's place is the only argument."""
    copy = Path(sys.argv[1])
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported; what tests/conftest.py does
    for name in LIBRARIES:
        with contextlib.suppress(ImportError):  # a platform may lack one
            importlib.import_module(name)
    for line in sys.stdin:
        words, timeout_s = json.loads(line)
        with tempfile.TemporaryFile("w+") as said:
            print(json.dumps(_run(copy, words, timeout_s, said)), flush=True)


def _run(copy: Path, words: list[str], timeout_s: float, said: IO[str]) -> str:
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        _test(copy, words, said)
    end_s = time.monotonic() + timeout_s
    while True:
        gone, status = os.waitpid(child, os.WNOHANG)
        if gone:
            break
        if time.monotonic() > end_s:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            said.seek(0)
            return f"not at its end after {timeout_s:g} s: {said.read().splitlines()[-1:]}"
        time.sleep(0.02)
    if status == 0:
        return ""
    said.seek(0)
    failed = [line for line in said if line.startswith(("FAILED ", "ERROR tests/"))]
    return failed[0].strip()[:140] if failed else f"exit status {os.waitstatus_to_exitcode(status)}"


def _test(copy: Path, words: list[str], said: IO[str]) -> None:
    """Run pytest; does not return."""
    status = 70
    try:
        os.chdir(copy)
        sys.path.insert(0, str(copy / "src"))
        for stream in (1, 2):
            os.dup2(said.fileno(), stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        status = int(importlib.import_module("pytest").main(words))
        sys.stdout.flush()
    finally:
        os._exit(status)


if __name__ == "__main__":
    main()
