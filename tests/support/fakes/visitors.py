"""Clients for tests of a running cluster: some read to the end and keep what they got, some leave in the middle."""

import json
import random
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import httpx
import openai

from twostroke import Client, TwostrokeError

VOCAB = 4096
TIMEOUT_S = 90.0  # of every request: what is not over then hangs
MODEL = "twostroke-bundled"


def prompt_of(num_tokens: int, seed: int | str) -> list[int]:
    """Ids that no other seed's prompt begins with."""
    chance = random.Random(seed)
    return [chance.randrange(10, VOCAB) for _ in range(num_tokens)]


@dataclass
class Told:
    """What one client had in the end."""

    request_id: str
    prompt: list[int]
    max_tokens: int
    token_ids: list[int] = field(default_factory=list)  # SDK only
    text: str = ""
    is_whole: bool = False
    error_code: str = ""
    ended_s: float = 0.0
    heard: threading.Event = field(default_factory=threading.Event)  # something came


class Crowd:
    """Readers in threads. Leaving the `with` waits for all of them; none may outlive its request's timeout."""

    def __init__(self, url: str, grpc_address: str, name: str) -> None:
        self.told: list[Told] = []
        self._url = url
        self._name = name
        self._client = Client(grpc_address, timeout_s=TIMEOUT_S)
        self._pool = ThreadPoolExecutor(32)
        self._futures: list[Future[None]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            for future in self._futures:
                future.result(TIMEOUT_S + 30)
        finally:
            self._pool.shutdown(wait=False)
            self._client.close()

    def sdk(self, prompt: list[int], max_tokens: int) -> Told:
        """One more reader of an SDK stream."""
        return self._start(self._read_sdk, prompt, max_tokens)

    def http(self, prompt: list[int], max_tokens: int) -> Told:
        """One more reader of a raw HTTP event stream."""
        return self._start(self._read_http, prompt, max_tokens)

    def until_all_heard(self, timeout_s: float = 60.0) -> None:
        """Wait until every reader has something."""
        end_s = time.monotonic() + timeout_s
        for told in self.told:
            assert told.heard.wait(max(0.0, end_s - time.monotonic())), f"{told.request_id} heard nothing"

    def _start(self, read: Callable[[Told], None], prompt: list[int], max_tokens: int) -> Told:
        told = Told(f"{self._name}-{len(self.told)}", prompt, max_tokens)
        self.told.append(told)
        self._futures.append(self._pool.submit(read, told))
        return told

    def _read_sdk(self, told: Told) -> None:
        options: Any = {"max_tokens": told.max_tokens, "temperature": 0.0, "ignore_eos": True}
        try:
            with self._client.generate_stream(told.prompt, request_id=told.request_id, **options) as stream:
                for chunk in stream:
                    if chunk.token_ids:
                        assert chunk.first_index == len(told.token_ids), "a gap, or a token twice"
                    told.token_ids += chunk.token_ids
                    told.text += chunk.text
                    told.heard.set()
                    if chunk.usage is not None:
                        assert chunk.usage.completion_tokens == len(told.token_ids)
            told.is_whole = True
        except TwostrokeError as error:
            told.error_code = error.code
        finally:
            told.ended_s = time.monotonic()

    def _read_http(self, told: Told) -> None:
        body = {"model": MODEL, "prompt": told.prompt, "max_tokens": told.max_tokens, "temperature": 0, "stream": True}
        body |= {"ignore_eos": True, "request_id": told.request_id}
        try:
            with httpx.stream("POST", f"{self._url}/v1/completions", json=body, timeout=TIMEOUT_S) as reply:
                if reply.status_code != 200:
                    told.error_code = json.loads(reply.read())["error"]["code"]
                    return
                for line in reply.iter_lines():
                    self._take_event(told, line)
        finally:
            told.ended_s = time.monotonic()

    def _take_event(self, told: Told, line: str) -> None:
        if not line:
            return
        assert line.startswith("data: "), line
        assert not told.is_whole, f"something follows the last event: {line}"
        assert not told.error_code, f"something follows the error: {line}"
        told.heard.set()
        if line == "data: [DONE]":
            told.is_whole = True
            return
        event = json.loads(line.removeprefix("data: "))
        if "error" in event:
            told.error_code = event["error"]["code"]
        else:
            told.text += event["choices"][0]["text"]


# ---------------------------------------------------------------- clients that leave


class Visitor(Protocol):
    """A client that has sent a streaming request."""

    def listen(self) -> None:
        """Wait for the first piece."""
        ...

    def leave(self) -> None:
        """Be gone, whatever the server still wants to say."""
        ...


class SocketVisitor:
    """HTTP by hand; leaves by closing the socket."""

    def __init__(self, url: str, _: str, prompt: list[int], max_tokens: int, request_id: str) -> None:
        fields = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": True, "ignore_eos": True}
        body = json.dumps({"model": MODEL, "request_id": request_id, **fields}).encode()
        host, port = url.removeprefix("http://").split(":")
        self._socket = socket.create_connection((host, int(port)), timeout=TIMEOUT_S)
        head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
        self._socket.sendall(head.encode() + f"content-length: {len(body)}\r\n\r\n".encode() + body)

    def listen(self) -> None:
        heard = b""
        while b"data: {" not in heard:
            part = self._socket.recv(4096)
            assert part, heard
            heard += part

    def leave(self) -> None:
        self._socket.close()


class SdkVisitor:
    """The SDK; leaves by closing the stream."""

    def __init__(self, _: str, grpc_address: str, prompt: list[int], max_tokens: int, request_id: str) -> None:
        self._client = Client(grpc_address, timeout_s=TIMEOUT_S)
        options: Any = {"max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True, "request_id": request_id}
        self._stream = self._client.generate_stream(prompt, **options)

    def listen(self) -> None:
        next(self._stream)

    def leave(self) -> None:
        self._stream.close()
        self._client.close()


class OpenAiVisitor:
    """The official client; leaves by closing the stream. Its call returns with the first piece."""

    def __init__(self, url: str, _: str, prompt: list[int], max_tokens: int, request_id: str) -> None:
        self._client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=TIMEOUT_S)
        ours = {"ignore_eos": True, "request_id": request_id}
        common: dict[str, Any] = {"model": MODEL, "max_tokens": max_tokens, "temperature": 0, "extra_body": ours}
        self._stream: Any = self._client.completions.create(prompt=prompt, stream=True, **common)

    def listen(self) -> None:
        next(iter(self._stream))

    def leave(self) -> None:
        self._stream.close()
        self._client.close()
