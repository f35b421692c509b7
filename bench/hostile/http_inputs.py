"""HTTP requests that try to cost a router more than they cost their sender: bodies of at most 4 MiB, and heads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

COMPLETIONS, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"

_TURN = b'{"role":"user","content":"x"}'
_CALL = (
    b'{"messages":[%s,{"role":"assistant","tool_calls":[{"type":"function","function":{"name":"a","arguments":%s}}]}]}'
)


_LONG_CALL = b'{"type":"function_call","call_id":"c","name":"f","arguments":"%s"}'


class Body(NamedTuple):
    """A body for one path; `is_bounded` says whether its structure alone is refused."""

    name: str
    path: str
    data: bytes
    is_bounded: bool


def bodies() -> Iterator[Body]:
    """All hostile bodies, one at a time: each is megabytes."""
    yield Body("lists", COMPLETIONS, _prompt(b"[1]", 900_000), True)
    yield Body("ids of 2 M tokens", COMPLETIONS, _prompt(b"1", 2_000_000), True)
    yield Body("ids of 500,000 tokens", COMPLETIONS, _prompt(b"3999", 500_000), False)
    yield Body("integers of 4,300 digits", COMPLETIONS, _prompt(b"1" * 4300, 960), False)
    yield Body("floats", COMPLETIONS, _prompt(b"1.5", 600_000), False)
    yield Body("mixed prompt", COMPLETIONS, _prompt(b'1,"a"', 300_000), False)
    yield Body("depth", COMPLETIONS, b'{"prompt":' + b"[" * 4_000_000, True)
    yield Body("depth of objects", COMPLETIONS, b'{"prompt":' + b'{"a":' * 800_000, True)
    yield Body("stops", COMPLETIONS, b'{"prompt":"x","stop":[' + b"1," * 600_000 + b"1]}", False)
    yield Body("unknown fields", COMPLETIONS, b'{"prompt":"x",' + _fields(300_000) + b"}", True)
    yield Body("one long unknown field", COMPLETIONS, b'{"prompt":"x","' + b"a" * 4_100_000 + b'":1}', False)
    yield Body("escapes", COMPLETIONS, b'{"prompt":"' + b"\\\\" * 2_000_000 + b'"}', False)
    yield Body("spaces", COMPLETIONS, b'{"prompt":1' + b" " * 4_100_000 + b"}", False)
    yield Body("arguments", CHAT, _CALL % (_TURN, b"[" + b"[]," * 1_300_000 + b"[]]"), True)
    yield Body("text of arguments", CHAT, _CALL % (_TURN, b'"[' + b"[]," * 1_300_000 + b'[]]"'), False)
    fields = b'{"messages":[{"role":"user","content":"x",%s}]}' % _fields(270_000)
    yield Body("fields of a message", CHAT, fields, True)
    options = b'{"messages":[%s],"chat_template_kwargs":{%s}}' % (_TURN, _fields(270_000))
    yield Body("template options", CHAT, options, True)
    patterns = b",".join(b'{"type":"string","pattern":".*a%d.*"}' % number for number in range(200))
    yield Body("patterns of a schema", COMPLETIONS, _ruled(b'"guided_json":{"allOf":[%s]}' % patterns), False)
    yield Body(
        "depth of a schema", COMPLETIONS, _ruled(b'"guided_json":' + b'{"items":' * 55 + b"{}" + b"}" * 55), False
    )
    yield Body("a long schema", COMPLETIONS, _ruled(b'"guided_json":{"enum":[%s]}' % (b"1," * 600_000 + b"1")), False)
    yield Body("repeats of a regex", COMPLETIONS, _ruled(b'"guided_regex":"((((a{100}){100}){100}){100})"'), False)
    yield Body("messages", CHAT, b'{"messages":[' + b",".join([_TURN] * 130_000) + b"]}", True)
    yield Body("items", RESPONSES, _input(_TURN, 100_000), True)
    yield Body("items that are numbers", RESPONSES, _input(b"7", 600_000), False)
    yield Body("depth of an item", RESPONSES, b'{"input":[' + b'{"content":' * 360_000, True)
    yield Body("parts of an item", RESPONSES, _input(b'{"role":"user","content":[%s]}' % _parts(30_000), 1), False)
    yield Body("arguments of an item", RESPONSES, _input(_LONG_CALL % (b"[" * 4_000_000), 1), False)
    yield Body("fields of an item", RESPONSES, _input(b'{"role":"user","content":"x",%s}' % _fields(60_000), 1), False)
    yield Body("a long id", RESPONSES, b'{"input":"x","previous_response_id":"%s"}' % (b"r" * 4_100_000), False)
    yield Body("metadata", RESPONSES, b'{"input":"x","metadata":{%s}}' % _fields(60_000), False)


def heads() -> Iterator[tuple[str, bytes]]:
    """Heads that a server must not keep, each as a prefix to be sent and followed by nothing."""
    start = b"GET /health HTTP/1.1\r\nhost: localhost\r\n"
    yield "one header of 1 MiB", start + b"a: " + b"b" * (1 << 20)
    yield "10,000 headers", start + b"".join(b"a%d: b\r\n" % place for place in range(10_000)) + b"\r\n"
    yield "a path of 1 MiB", b"GET /" + b"a" * (1 << 20)
    yield "1,000 pipelined requests", (start + b"\r\n") * 1000
    yield "half a head", start
    yield "no head", b""


def _prompt(item: bytes, num_items: int) -> bytes:
    return b'{"prompt":[' + b",".join([item] * num_items) + b"]}"


def _input(item: bytes, num_items: int) -> bytes:
    return b'{"input":[' + b",".join([item] * num_items) + b"]}"


def _parts(num_parts: int) -> bytes:
    return b",".join([b'{"type":"input_text","text":"x"}'] * num_parts)


def _fields(num_fields: int) -> bytes:
    return b",".join(b'"f%d":1' % place for place in range(num_fields))


def _ruled(rule: bytes) -> bytes:
    return b'{"prompt":"x","max_tokens":4,%s}' % rule
