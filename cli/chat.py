"""`twostroke chat`: a chat with the cluster in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Console

from ..client.calls import Options
from ..client.client import Client
from ..client.values import ModelCard
from ..core.errors import TwostrokeError
from .status import ApiKey, Ca, Cert, Grpc, Insecure, Key, tls_of

ASK_S = 5.0  # for the router to say what it serves
ANSWER_S = 600.0  # a slow machine may answer a long question; Ctrl-C ends an answer


def chat(
    grpc: Grpc = "127.0.0.1:8001",
    api_key: ApiKey = None,
    insecure: Insecure = False,
    tls_ca: Ca = None,
    tls_cert: Cert = None,
    tls_key: Key = None,
    model: Annotated[str | None, typer.Option(help="A model or adapter, where several are served.")] = None,
    system: Annotated[str | None, typer.Option(help="A system prompt.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Default: until the answer ends.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="Default: the model's.")] = None,
) -> None:
    """Chat, turn by turn. Ctrl-C stops an answer; Ctrl-D or an empty line ends. Exit code 1: the last one failed."""
    console = Console()
    messages = [{"role": "system", "content": system}] if system else []
    options: Options = {}
    if model is not None:
        options["model"] = model
    if max_tokens is not None:
        options["max_tokens"] = max_tokens
    if temperature is not None:
        options["temperature"] = temperature
    tls = tls_of(tls_ca)
    with Client(
        grpc, api_key=api_key, insecure=insecure, tls=tls, cert=tls_cert, key=tls_key, timeout_s=ASK_S
    ) as client:
        models = client.models()  # who is asked for a question must know that somebody answers
    with Client(
        grpc, api_key=api_key, insecure=insecure, tls=tls, cert=tls_cert, key=tls_key, timeout_s=ANSWER_S
    ) as client:
        if console.is_terminal:
            console.print(_greeting(models, model, grpc), markup=False, highlight=False, style="dim")
        answer: str | None = ""
        while question := _question(console):
            messages.append({"role": "user", "content": question})
            answer = _answer(client, messages, options, console)
            if answer is None:
                messages.pop()
            else:
                messages.append({"role": "assistant", "content": answer})
    if answer is None:
        raise typer.Exit(1)


def _greeting(models: Sequence[ModelCard], wanted: str | None, grpc: str) -> str:
    served = wanted or ", ".join(card.id for card in models) or "no model yet"
    return f"{served} at {grpc}; Ctrl-C stops an answer, Ctrl-D ends the chat"


def _question(console: Console) -> str:
    """Read the next line; empty if the user ends the chat."""
    try:
        return console.input("[bold cyan]you[/bold cyan]  ").strip()
    except (EOFError, KeyboardInterrupt):
        console.print()
        return ""


def _answer(client: Client, messages: list[dict[str, str]], options: Options, console: Console) -> str | None:
    """Print and return the streamed answer. After Ctrl-C: the part so far. None: an error, which is shown."""
    text = ""
    console.print("[bold green]model[/bold green]", end="  ")
    try:
        with client.chat_stream(messages, **options) as stream:
            for chunk in stream:
                if chunk.reasoning:
                    console.print(chunk.reasoning, style="dim", end="", markup=False, highlight=False, soft_wrap=True)
                console.print(chunk.text, end="", markup=False, highlight=False, soft_wrap=True)
                text += chunk.text
    except KeyboardInterrupt:
        pass  # leaving the stream has cancelled the request
    except TwostrokeError as error:
        console.print(f"\n[red]{error.code}[/red]: {error}")
        return None
    console.print()
    return text
