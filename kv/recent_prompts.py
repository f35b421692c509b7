"""The names of recent requests' prompts: a process hashes a prompt once for all choices and dispatches of a request."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from ..core.request import CacheScope
from .keys import PromptHasher, PromptNames

MAX_TOKENS = 1 << 18  # of the prompts that are remembered; with their names about 40 bytes each


class NamedPrompt(NamedTuple):
    """The ids of a prompt and the names of its blocks."""

    prompt_ids: tuple[int, ...]
    names: PromptNames


class RecentPrompts:
    """Prompts by request, the least recent ones forgotten first. The newest is kept however long it is."""

    def __init__(self, hasher: PromptHasher, max_tokens: int = MAX_TOKENS) -> None:
        self._hasher = hasher
        self._max_tokens = max_tokens
        self._prompts: OrderedDict[str, NamedPrompt] = OrderedDict()
        self._num_tokens = 0

    def name(self, request_id: str, prompt_ids: tuple[int, ...], scope: CacheScope) -> NamedPrompt:
        """The prompt of a request with its names; an equal tuple that is known takes the place of `prompt_ids`.

        What is known of another prompt, scope or model under the same `request_id` is not used.
        """
        known = self._prompts.get(request_id)
        if known is not None and known.names.root == self._hasher.root(scope) and known.prompt_ids == prompt_ids:
            self._prompts.move_to_end(request_id)
            return known
        prompt = NamedPrompt(prompt_ids, self._hasher.name(prompt_ids, scope))
        self._forget(request_id)
        self._prompts[request_id] = prompt
        self._num_tokens += len(prompt_ids)
        while self._num_tokens > self._max_tokens and len(self._prompts) > 1:
            self._forget(next(iter(self._prompts)))
        return prompt

    def _forget(self, request_id: str) -> None:
        prompt = self._prompts.pop(request_id, None)
        if prompt is not None:
            self._num_tokens -= len(prompt.prompt_ids)
