"""Decisions of the planner with their reasons and all terms, and a bounded log of them. Plain values."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ...core.request import Role


@dataclass(frozen=True, slots=True)
class Hold:
    """Nothing to do."""

    name = "hold"


@dataclass(frozen=True, slots=True)
class ChangeRole:
    """Give a worker that serves another role."""

    worker: str
    role: Role
    name = "change_role"


@dataclass(frozen=True, slots=True)
class Start:
    """Start so many workers of these roles."""

    roles: tuple[Role, ...]
    name = "start"


@dataclass(frozen=True, slots=True)
class Drain:
    """Let these workers take no new work; what they run goes on."""

    workers: tuple[str, ...]
    name = "drain"


@dataclass(frozen=True, slots=True)
class Stop:
    """End the process of a worker that drained and has no work."""

    worker: str
    name = "stop"


Action = Hold | ChangeRole | Start | Drain | Stop
HOLD = Hold()


@dataclass(frozen=True, slots=True)
class Terms:
    """All numbers of a decision. Work is in worker-seconds per second."""

    prompts_per_s: float = 0.0
    prompt_tokens_per_s: float = 0.0
    prefill_work: float = 0.0
    prefill_work_forecast: float = 0.0  # when a worker started now would serve
    prefill_backlog_s: float = 0.0  # of one worker's time
    prompt_mean_ms: float = 0.0
    prompt_variability: float = 0.0
    decode_kv_tokens_per_ms: float = 0.0  # what is asked of decode, whatever its number of workers
    decode_kv_tokens_per_ms_forecast: float = 0.0
    decode_tokens_per_ms: float = 0.0  # generated
    decode_kv_tokens: float = 0.0  # in use now
    step_base_ms: float = 0.0
    step_ms_per_kv_token: float = 0.0
    step_predicted_ms: float = 0.0  # with the present workers; 0: without bound
    needed_prefill: int = 0
    needed_decode: int = 0
    needed_prefill_forecast: int = 0
    needed_decode_forecast: int = 0
    needed_in_window: int = 0  # most of both roles within shrink_cooldown_s, with hysteresis
    have_prefill: int = 0
    have_decode: int = 0
    starting: int = 0
    draining: int = 0


@dataclass(frozen=True, slots=True)
class Decision:
    """One decision. The caller carries out `action`."""

    at_s: float
    action: Action
    reason: str
    terms: Terms = field(default_factory=Terms)
    pending: tuple[str, ...] = ()  # earlier actions whose effect is not seen yet
    desired: Mapping[str, int] = field(default_factory=dict)  # workers by role that the terms ask for, within bounds

    def facts(self) -> dict[str, Any]:
        """The decision as plain values, for logs and `status`; without its time, which only its clock understands."""
        terms = {name: round(value, 6) for name, value in asdict(self.terms).items()}
        return {
            "action": self.action.name,
            **asdict(self.action),
            "reason": self.reason,
            "pending": list(self.pending),
            "desired": dict(self.desired),
            "terms": terms,
        }


class DecisionLog:
    """The last decisions. Equal ones in a row that do nothing are one entry, so that hours of rest do not fill it."""

    def __init__(self, most: int) -> None:
        self._entries: deque[Decision] = deque(maxlen=most)

    def add(self, decision: Decision) -> None:
        """Add a decision."""
        last = self._entries[-1] if self._entries else None
        is_rest = isinstance(decision.action, Hold) and last is not None and isinstance(last.action, Hold)
        if is_rest and last is not None and last.desired == decision.desired and last.pending == decision.pending:
            self._entries.pop()
        self._entries.append(decision)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def entries(self) -> tuple[Decision, ...]:
        """Oldest first."""
        return tuple(self._entries)

    @property
    def last_action(self) -> Decision | None:
        """The last decision that did something."""
        return next((entry for entry in reversed(self._entries) if not isinstance(entry.action, Hold)), None)
