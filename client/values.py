"""Results of the SDK: plain frozen values, independent of the wire format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..core.request import FinishReason, TokenLogprobs


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one request, over all its choices."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int  # prompt tokens whose KV was cached, not computed for this request
    reasoning_tokens: int = 0  # of the completion tokens of a chat
    draft_tokens: int = 0  # guessed by speculative decoding; not billed
    accepted_tokens: int = 0  # those of them that were right: part of the completion tokens

    @property
    def total_tokens(self) -> int:
        """Sum of prompt and completion tokens."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool call that an answer asks for, always complete."""

    id: str
    name: str
    arguments: str  # text of a JSON object

    @property
    def message_part(self) -> dict[str, Any]:
        """The call as the `tool_calls` of an assistant message have it."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass(frozen=True, slots=True)
class Choice:
    """One complete choice. `token_ids` include the tokens of a stop string; `text` does not."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    logprobs: tuple[TokenLogprobs, ...] = ()  # one per token id, if requested
    reasoning: str = ""  # of a chat, not in `text`
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """Answer to `generate` and `chat`."""

    request_id: str
    model: str
    choices: tuple[Choice, ...]
    usage: Usage
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()  # of the prompt's tokens from the second on, if requested

    @property
    def text(self) -> str:
        """Text of the first choice."""
        return self.choices[0].text


@dataclass(frozen=True, slots=True)
class Chunk:
    """Piece of one choice. The joined pieces of a choice are its text and its ids, without gap or repeat."""

    request_id: str
    model: str
    choice: int
    text: str
    token_ids: tuple[int, ...]
    first_index: int  # index of token_ids[0] among the choice's tokens
    finish_reason: FinishReason | None  # set on a choice's last piece
    usage: Usage | None  # set on the stream's last piece
    cursor: str  # position for resuming the stream; empty if the server cannot resume
    logprobs: tuple[TokenLogprobs, ...] = ()  # one per token id, if requested
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()  # if requested, in the first piece of choice 0
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()  # each complete, in order


@dataclass(frozen=True, slots=True)
class Tokens:
    """Answer to `tokenize`."""

    ids: tuple[int, ...]
    max_model_len: int  # largest sum of prompt and completion tokens

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class ModelCard:
    """One served model."""

    id: str
    max_model_len: int
