"""The words of one request inside the cluster: what to generate from, how, and under which name."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen. Already validated: ranges hold, `seed` and `max_tokens` are set.

    A token is argmax(filtered logits / temperature + Gumbel noise), the noise keyed by (seed, choice, position,
    token id); temperature 0 is greedy.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0


class Epoch(NamedTuple):
    """Which dispatch of a request is the living one. Ordered: the higher one wins."""

    incarnation: int
    counter: int


class SequenceKey(NamedTuple):
    """One choice of one request: the unit that workers run."""

    request_id: str
    choice: int


class FinishReason(StrEnum):
    """Why a choice ended. Values are OpenAI's words where they have one."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


class Role(StrEnum):
    """What a worker does. Data, not a class: one process can take another role while it runs."""

    PREFILL = "prefill"
    DECODE = "decode"
    COMBINED = "combined"  # prefills what it decodes; takes no hand-overs


@dataclass(frozen=True, slots=True)
class Request:
    """One admitted request in the router: the same value whether it came over HTTP or gRPC."""

    request_id: str
    model: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    num_choices: int
    isolation_domain: str
    timeout_s: float
    is_chat: bool = False
