"""The objects of a response: itself, its items, its usage. Knows no stream and no HTTP."""

from __future__ import annotations

from typing import Any

from .....core.errors import TwostrokeError
from .....core.request import Request
from ....requests.pieces import TokenUsage

FACE = "response"  # object of the answers, in the journal


def name_of(prefix: str, response: str, place: int) -> str:
    """Id of an item: the same whichever router makes the answer again."""
    return f"{prefix}_{response.removeprefix('resp_')}{place:04x}"


def head_of(said: dict[str, Any], request: Request, created_s: int) -> dict[str, Any]:
    """The fields of a response that stay as they are from its beginning to its end."""
    sampling = request.sampling
    return {
        "id": request.request_id,
        "object": "response",
        "created_at": created_s,
        "model": request.model,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        **said,
    }


def usage_of(usage: TokenUsage | None, reasoning_tokens: int) -> dict[str, Any] | None:
    """Token counts of a response."""
    if usage is None:
        return None
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def error_of(error: TwostrokeError) -> dict[str, Any]:
    """The error of a response that failed after it had begun, with one of OpenAI's codes."""
    code = "rate_limit_exceeded" if error.http_status == 429 else "server_error"
    return {"code": "invalid_prompt" if 400 <= error.http_status < 429 else code, "message": error.message}


def message_item(name: str) -> dict[str, Any]:
    """A message without parts."""
    return {"id": name, "type": "message", "status": "in_progress", "role": "assistant", "content": []}


def reasoning_item(name: str) -> dict[str, Any]:
    """Reasoning without parts. It is never encrypted: its text is in its content."""
    return {
        "id": name,
        "type": "reasoning",
        "status": "in_progress",
        "summary": [],
        "content": [],
        "encrypted_content": None,
    }


def call_item(name: str, call_id: str, function: str) -> dict[str, Any]:
    """A call without arguments."""
    return {
        "id": name,
        "type": "function_call",
        "status": "in_progress",
        "call_id": call_id,
        "name": function,
        "arguments": "",
    }


def text_part(text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    """A part of a message."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}
