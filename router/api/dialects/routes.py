"""All routes of the dialects, for the HTTP server."""

from __future__ import annotations

from ...config import RouterConfig
from ..frontend import Frontend
from .anthropic_routes import anthropic_routes
from .door import DialectRoute, Door, Reads
from .ollama_routes import ollama_routes
from .responses.routes import responses_routes


def dialect_routes(config: RouterConfig, front: Frontend, reads: Reads) -> list[DialectRoute]:
    """Paths with their handlers. Errors take the form of `errors.error_form`."""
    door = Door(config, front, reads)
    return [*anthropic_routes(door), *ollama_routes(door), *responses_routes(door)]
