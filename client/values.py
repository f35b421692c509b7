"""What the SDK gives back: plain frozen values, without a trace of the wire."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.request import FinishReason, TokenLogprobs


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request, over all its choices."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int  # prompt tokens whose KV nobody computed for this request

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Choice:
    """One complete continuation. `token_ids` include those that make up a stop string, `text` does not."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    logprobs: tuple[TokenLogprobs, ...] = ()  # one per token id, where asked for


@dataclass(frozen=True, slots=True)
class Completion:
    """The answer to `generate` and `chat`."""

    request_id: str
    model: str
    choices: tuple[Choice, ...]
    usage: Usage
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()  # of the prompt's tokens from the second on, where asked for

    @property
    def text(self) -> str:
        """The first choice's text."""
        return self.choices[0].text


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of one choice. Pieces of a choice, put together, are its text and its ids, without gap or repeat."""

    request_id: str
    model: str
    choice: int
    text: str
    token_ids: tuple[int, ...]
    first_index: int  # place of token_ids[0] among the choice's tokens
    finish_reason: FinishReason | None  # set on a choice's last piece
    usage: Usage | None  # set on the stream's last piece
    cursor: str  # where the stream could be resumed; empty when the server cannot
    logprobs: tuple[TokenLogprobs, ...] = ()  # one per token id, where asked for
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()  # where asked for, with the first piece of choice 0


@dataclass(frozen=True, slots=True)
class Tokens:
    """The answer to `tokenize`."""

    ids: tuple[int, ...]
    max_model_len: int  # tokens that prompt and completion may have together

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class ModelCard:
    """One served model."""

    id: str
    max_model_len: int
