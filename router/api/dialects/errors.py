"""Errors in the form of a dialect, chosen by the path of the request. Knows no server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ....core.errors import TwostrokeError
from ..openai_responses import error_body

ErrorForm = Callable[[TwostrokeError], dict[str, Any]]

_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def anthropic_error(error: TwostrokeError) -> dict[str, Any]:
    """Anthropic's form: `{"type": "error", "error": {"type", "message"}}`."""
    usual = "invalid_request_error" if error.http_status < 500 else "api_error"
    kind = _ANTHROPIC_TYPES.get(error.http_status, usual)
    return {"type": "error", "error": {"type": kind, "message": error.message}}


def ollama_error(error: TwostrokeError) -> dict[str, Any]:
    """Ollama's form: `{"error": message}`."""
    return {"error": error.message}


def error_form(path: str) -> ErrorForm:
    """The form of errors for a path; OpenAI's for all that belong to no dialect."""
    if path == "/v1/messages" or path.startswith("/v1/messages/"):
        return anthropic_error
    return ollama_error if path.startswith("/api/") else error_body
