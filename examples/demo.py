"""`make demo`: a disaggregated cluster on this machine, real traffic through its HTTP API, and the proof beside it.

Starts 2 prefill workers, 2 decode workers and a router (on a local Ray), talks to them with the official `openai`
client, prints what happened to each request, and checks every greedy text against the same model in one piece.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from openai import AsyncOpenAI, DefaultAsyncHttpxClient
from rich.console import Console
from rich.table import Table

from twostroke import AsyncClient
from twostroke.cluster.config import Config, load_config
from twostroke.cluster.prepare import prepare
from twostroke.cluster.supervisor import Supervisor
from twostroke.core.errors import TwostrokeError
from twostroke.core.foreground import Stop, run, unless

console = Console(highlight=False, width=None if sys.stdout.isatty() else 130)

SHARED_PREFIX = '''"""Small helpers for text files."""

import os
import re
from pathlib import Path


def read_lines(path: Path) -> list[str]:
    """Return the lines of a file without their line ends."""
    with open(path, encoding="utf-8") as file:
        return [line.rstrip("\\n") for line in file]


def count_words(text: str) -> dict[str, int]:
    """Count how often every word occurs in the text."""
    counts: dict[str, int] = {}
    for word in re.findall(r"[a-z]+", text.lower()):
        counts[word] = counts.get(word, 0) + 1
    return counts


'''
ENDINGS = (
    "def first_line(path",
    "def last_line(path",
    "def is_empty(path",
    "def join_lines(lines",
    "def longest_word(text",
    "def write_lines(path",
    "def remove_file(path",
    "class WordCounter:\n",
)
QUESTIONS = ("Hello!", "What does os.path.join do?", "Thanks!")


@dataclass
class Asked:
    """One request: what was sent, what came, and what the router says of it."""

    label: str
    messages: list[dict[str, str]] | None = None
    prompt: str | None = None
    max_tokens: int = 48
    text: str = ""
    request_id: str = ""
    explained: dict[str, Any] = field(default_factory=dict)


async def ask(client: AsyncOpenAI, model: str, asked: Asked, show: bool) -> None:
    """Stream one request; fills in text and id."""
    common: dict[str, Any] = {"model": model, "max_tokens": asked.max_tokens, "temperature": 0, "stream": True}
    if asked.messages is not None:
        stream: Any = await client.chat.completions.create(messages=asked.messages, **common)
    else:
        stream = await client.completions.create(prompt=asked.prompt, **common)
    async for chunk in stream:
        asked.request_id = chunk.id
        for choice in chunk.choices:
            piece = (choice.delta.content if asked.messages is not None else choice.text) or ""
            asked.text += piece
            if show:
                console.print(piece, end="", markup=False, soft_wrap=True)
    if show:
        console.print()


async def chat_of_three_turns(client: AsyncOpenAI, model: str) -> list[Asked]:
    """Each turn carries the conversation so far, so its prefix is in the cache."""
    messages: list[dict[str, str]] = []
    turns = []
    for number, question in enumerate(QUESTIONS, start=1):
        messages.append({"role": "user", "content": question})
        asked = Asked(f"chat turn {number}", messages=list(messages))
        console.print(f"\n[bold cyan]user[/bold cyan]  {question}\n[bold green]model[/bold green] ", end=" ")
        await ask(client, model, asked, show=True)
        messages.append({"role": "assistant", "content": asked.text})
        turns.append(asked)
    return turns


async def eight_at_once(client: AsyncOpenAI, model: str) -> list[Asked]:
    """Eight concurrent prompts that share a long prefix."""
    console.print("\n[bold]eight concurrent prompts with a shared prefix[/bold]")
    all_asked = [Asked(f"shared prefix {n}", prompt=SHARED_PREFIX + end) for n, end in enumerate(ENDINGS, start=1)]
    await asyncio.gather(*(ask(client, model, asked, show=False) for asked in all_asked))
    for asked, end in zip(all_asked, ENDINGS, strict=True):
        first = (end + asked.text).splitlines()[:2]
        console.print(f"  [dim]{asked.label}[/dim]  {' ⏎ '.join(first)[:90]}", markup=True)
    return all_asked


async def one_long_prompt(client: AsyncOpenAI, sdk: AsyncClient, model: str) -> Asked:
    """At least 2,000 tokens, so that KV frames travel while later chunks still compute."""
    source, number = SHARED_PREFIX, 0
    while len((await sdk.tokenize(source)).ids) < 2000:
        source += SHARED_PREFIX.replace("read_lines", f"read_lines_{number}").replace("count_words", f"words_{number}")
        number += 1
    asked = Asked("long prompt", prompt=source + "def ", max_tokens=32)
    console.print("\n[bold]a prompt of more than 2,000 tokens[/bold], continued after 'def ':")
    await ask(client, model, asked, show=True)
    return asked


def row(asked: Asked) -> list[str]:
    """One line of the table."""
    facts = asked.explained
    itl = facts.get("itl_ms") or {}
    moved, as_bf16 = facts["kv_bytes_moved"], facts["kv_bytes_as_bf16"]
    return [
        asked.label,
        f"{facts['ttft_ms']:.0f}",
        f"{itl['mean']:.1f}" if itl else "",
        str(facts["tokens"]["prompt"]),
        str(facts["tokens"]["cached"]),
        facts["prefill_worker"] or "—",
        facts["decode_worker"],
        f"{moved / 1024:,.0f}",
        f"{as_bf16 / 1024:,.0f}",
    ]


def show_table(all_asked: list[Asked]) -> None:
    """TTFT, ITL, tokens, who did it, and bytes, from GET /v1/requests/{id}/explain."""
    table = Table(title="\nwhat happened to each request", title_justify="left")
    headings = ("request", "TTFT ms", "ITL ms", "prompt", "cached", "prefill", "decode", "KV KiB", "in bf16")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number in (0, 5, 6) else "right")
    for asked in all_asked:
        table.add_row(*row(asked))
    console.print(table)


@asynccontextmanager
async def serving(config: Config, what: str) -> AsyncIterator[Supervisor]:
    """A cluster, up and serving, behind a progress display; at the end it drains, after a failure or Ctrl-C it ends."""
    began = time.monotonic()
    with console.status(f"starting {what}") as status:
        config, plan = await prepare(config, status.update)
        status.update(f"starting {what}")
        supervisor = Supervisor(config, plan, say=lambda line: console.print(f"  [dim]{line}[/dim]"))
    try:
        with status:
            await supervisor.start()
        console.print(f"{what}: up after {time.monotonic() - began:.1f} s at {supervisor.http_url}")
        yield supervisor
        with console.status("stopping the cluster"):
            await supervisor.stop()
    except BaseException:
        await supervisor.abort()
        raise


def openai_client(supervisor: Supervisor) -> AsyncOpenAI:
    """The official client. A proxy that the environment names is not for this machine."""
    direct = DefaultAsyncHttpxClient(trust_env=False)
    return AsyncOpenAI(base_url=supervisor.http_url + "/v1", api_key="none", http_client=direct)


async def traffic(supervisor: Supervisor) -> list[Asked]:
    """All requests of the demo, explained."""
    async with openai_client(supervisor) as client, AsyncClient(supervisor.grpc_address) as sdk:
        model = (await client.models.list()).data[0].id
        all_asked = await chat_of_three_turns(client, model)
        all_asked += await eight_at_once(client, model)
        all_asked.append(await one_long_prompt(client, sdk, model))
        for asked in all_asked:
            asked.explained = await sdk.explain(asked.request_id)
    return all_asked


async def in_one_piece(config: Config, all_asked: list[Asked]) -> list[str]:
    """The same requests one at a time, each with an empty cache, on one combined worker. Gives what differs."""
    different = []
    async with serving(config, "the same model in one piece") as supervisor, openai_client(supervisor) as client:
        model = (await client.models.list()).data[0].id
        with console.status("") as status:
            for number, asked in enumerate(all_asked, start=1):
                status.update(f"comparing {number} of {len(all_asked)}")
                again = Asked(asked.label, asked.messages, asked.prompt, asked.max_tokens)
                await ask(client, model, again, show=False)
                if again.text != asked.text:
                    different.append(f"{asked.label}: {asked.text!r} but in one piece {again.text!r}")
    return different


async def demo(launcher: str) -> int:
    """The whole demo. Exit code 0 only if every text is the same."""
    threads = {"step.num_threads": 1, "router.port": 0, "router.grpc_port": 0}
    # On an idle machine prefilling locally is often predicted to be quicker; the demo shows hand-overs.
    two_and_two = {
        "cluster.prefill": 2,
        "cluster.decode": 2,
        "cluster.launcher": launcher,
        "router.local_prefill": False,
    }
    apart = load_config(environment=os.environ, flags={**two_and_two, **threads})
    async with serving(apart, f"2 prefill + 2 decode workers + 1 router ({launcher})") as supervisor:
        all_asked = await traffic(supervisor)
    show_table(all_asked)
    alone = {"cluster.prefill": 0, "cluster.decode": 1, "cluster.launcher": "process", "cache.prefix_caching": False}
    whole = load_config(environment=os.environ, flags={**alone, **threads})
    different = await in_one_piece(whole, all_asked)
    for line in different:
        console.print(f"[red]differs[/red]  {line}", markup=True)
    if different:
        return 1
    console.print(
        f"\n[bold green]✓[/bold green] all {len(all_asked)} greedy texts equal those of the model in one piece"
    )
    return 0


async def until_stopped(stop: Stop, launcher: str) -> int:
    """The demo, or its end at Ctrl-C."""
    return await unless(stop.asked, demo(launcher))


def main() -> None:
    """Parse the launcher and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--launcher", choices=("ray", "process"), default="ray")
    launcher = parser.parse_args().launcher
    try:
        sys.exit(run(lambda stop: until_stopped(stop, launcher)))
    except TwostrokeError as error:
        sys.exit(f"demo: {error}")


if __name__ == "__main__":
    main()
