"""Whether guessing pays, by batch size: tokens per millisecond of measured steps with and without guesses. Pure.

Steps that only decode are measured, proposals included; batches of similar size (powers of two) are one class. A class
is measured in both ways first. Then it takes the faster one, guessing only with a gain of `MARGIN`, and tries the other
for two steps now and then: more rarely each time that this changes nothing, because a trial may cost.

Without measurements (in the simulator, in tests) every batch guesses, so that a schedule depends on no clock.
"""

from __future__ import annotations

from dataclasses import dataclass, field

MARGIN = 1.03
_FADE = 0.95  # weight of the past at each new step
_FIRST_STEPS = 4  # of each kind before the two are compared
_TRIAL_STEPS = 2
_FIRST_PAUSE, _LONGEST_PAUSE = 64, 4096  # steps between trials
_MOST_OVER_MEAN = 3.0  # a step that another process disturbed counts as this many mean steps at most


@dataclass(slots=True)
class _Kind:
    """Faded sums over steps of one kind."""

    steps: float = 0.0
    tokens: float = 0.0
    ms: float = 0.0
    seen: int = 0

    def add(self, tokens: int, ms: float) -> None:
        if self.seen:
            ms = min(ms, _MOST_OVER_MEAN * self.ms / self.steps)
        self.steps = _FADE * self.steps + 1
        self.tokens = _FADE * self.tokens + tokens
        self.ms = _FADE * self.ms + ms
        self.seen += 1

    @property
    def rate(self) -> float:
        """Tokens per millisecond."""
        return self.tokens / self.ms if self.ms else 0.0


@dataclass(slots=True)
class _Class:
    """Batches of one class of sizes."""

    plain: _Kind = field(default_factory=_Kind)
    drafted: _Kind = field(default_factory=_Kind)
    pause: int = _FIRST_PAUSE
    left: int = _FIRST_PAUSE  # steps until the next trial
    was_on: bool = True
    is_counted: bool = False  # the last step was taken off `left`


class DraftPace:
    """Switch of speculation per class of batch sizes."""

    def __init__(self) -> None:
        self._classes: dict[int, _Class] = {}

    def observe(self, num_seqs: int, num_drafts: int, num_tokens: int, took_ms: float) -> None:
        """Add a step of decodes only: its sequences, guessed tokens, tokens that it gave, and its time."""
        each = self._of(num_seqs)
        (each.drafted if num_drafts else each.plain).add(num_tokens, took_ms)

    def is_on(self, num_seqs: int) -> bool:
        """True if guessing pays in batches of this size, as far as is known."""
        each = self._of(num_seqs)
        return each.drafted.rate >= MARGIN * each.plain.rate

    def begins(self, num_seqs: int) -> bool:
        """Decide for the next step of decodes; call it once per step."""
        each = self._of(num_seqs)
        each.is_counted = each.drafted.seen >= _FIRST_STEPS and each.plain.seen >= _FIRST_STEPS
        if not each.is_counted:
            return each.drafted.seen < _FIRST_STEPS
        is_on = self.is_on(num_seqs)
        if is_on != each.was_on:
            each.was_on, each.pause = is_on, _FIRST_PAUSE
            each.left = each.pause
        if each.left <= -_TRIAL_STEPS:
            each.pause = min(2 * each.pause, _LONGEST_PAUSE)
            each.left = each.pause
        each.left -= 1
        if each.left >= 0:
            return is_on
        return not is_on

    def postpone(self, num_seqs: int) -> None:
        """Do not count the step of the last `begins`: what guesses was not ready, so the step tells nothing."""
        each = self._of(num_seqs)
        each.left += each.is_counted

    def _of(self, num_seqs: int) -> _Class:
        return self._classes.setdefault((num_seqs - 1).bit_length(), _Class())
