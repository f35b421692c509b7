"""The planner: when a worker changes its role, when workers start, when they go. Pure: no clock, network or process.

In this order, one action per decision:

1. Without a fresh observation, nothing.
2. A worker that drained and has no work is stopped.
3. A role with too few workers gets one of the other's spare ones; where both are short and no worker can be started at
   once, they share what is there.
4. If the forecast for the end of a start-up needs more than there are, so many are started, and as many as min_workers
   lacks; none for a time to the first token that one prompt alone misses, and none for a while after a start was
   refused or failed.
5. If the need, with hysteresis, was lower for a whole cool-down, the surplus is drained; where workers can go in one
   order only, by that, and a role that can spare a worker gives it to the one whose worker goes next.

A change of roles and a change of machines may be under way at the same time, two of one kind may not.
"""

from __future__ import annotations

from collections import deque

from ...core.request import Role
from .config import PlannerConfig
from .decision import HOLD, Action, ChangeRole, Decision, DecisionLog, Drain, Start, Stop, Terms
from .estimates import Estimates
from .needs import Needs, decoders_of, decoders_of_live, needs_of, terms_of
from .observation import Observation, work_of
from .pending import Pending
from .split import Bounds, Split, divided, is_better

_OTHER = {Role.PREFILL: Role.DECODE, Role.DECODE: Role.PREFILL}


class Planner:
    """State of the law for one cluster. `decide` is called once per interval; the caller carries out what it says."""

    def __init__(self, config: PlannerConfig, num_configured: int) -> None:
        """`num_configured`: workers that the cluster starts with; the most that there are if no maximum is given."""
        self._config = config
        self._bounds = Bounds.of(config, num_configured)
        self._estimates = Estimates(config)
        self._pending = Pending(config)
        self._needed: deque[tuple[float, int]] = deque()  # within the cool-down; falling, so the first is the most
        self._watched_since_s: float | None = None
        self._role_changed_s = self._machines_changed_s = float("-inf")
        self._refusal = ""
        self._refused_until_s = float("-inf")
        self.log = DecisionLog(config.log_decisions)

    def decide(self, observation: Observation | None, now_s: float, num_owned: int | None = None) -> Decision:
        """The next action, with its reason. `num_owned`: workers that run or will be restarted; None: those seen."""
        decision = self._decide(observation, now_s, num_owned)
        self.log.add(decision)
        return decision

    def refused(self, count: int, reason: str, now_s: float) -> None:
        """`count` of the workers that the last `Start` named do not come: there is no room, or they do not serve."""
        self._pending.refused(count)
        self._refusal, self._refused_until_s = reason, now_s + self._config.start_up_s

    @property
    def draining(self) -> tuple[str, ...]:
        """Workers that were told to drain and are not stopped yet."""
        return self._pending.draining

    def adopt(self, draining: tuple[str, ...], now_s: float) -> None:
        """Workers that an earlier planner told to drain: they are stopped when they have no work."""
        self._pending.drain(draining, now_s)

    def refusal(self, now_s: float) -> str:
        """Why no worker can be started at this time; empty: one can."""
        return self._refusal if now_s < self._refused_until_s else ""

    def _decide(self, observation: Observation | None, now_s: float, num_owned: int | None) -> Decision:
        if observation is None:
            self._forget_window()
            return Decision(now_s, HOLD, "no observation: the router does not answer")
        age_s = now_s - observation.at_s
        if age_s > self._config.stale_after_s:
            self._forget_window()
            return Decision(now_s, HOLD, f"the observation is {age_s:.1f} s old: too old to act on")
        self._estimates.take(observation, decoders_of(observation))
        self._pending.settle(observation, now_s)
        turn = _Turn(self, observation, now_s, num_owned)
        action, reason = turn.choose()
        self._note(action, observation, now_s)
        desired = {Role.PREFILL.value: turn.later.prefill, Role.DECODE.value: turn.later.decode}
        return Decision(now_s, action, reason, turn.terms(), self._pending.words(observation, now_s), desired)

    def _note(self, action: Action, observation: Observation, now_s: float) -> None:
        if isinstance(action, ChangeRole):
            self._pending.change(action.worker, action.role, now_s)
            self._role_changed_s = now_s
        elif isinstance(action, Start):
            self._pending.start(action.roles, observation, now_s)
            self._machines_changed_s = now_s
        elif isinstance(action, Drain):
            self._pending.drain(action.workers, now_s)
            self._machines_changed_s = now_s
        elif isinstance(action, Stop):
            self._pending.stop(action.worker)

    def _forget_window(self) -> None:
        """Start the cool-down again: without observations nobody knows that the need was low."""
        self._needed.clear()
        self._watched_since_s = None

    def _most_needed(self, needed: int, now_s: float) -> int:
        """The largest need within the cool-down, `needed` included."""
        if self._watched_since_s is None:
            self._watched_since_s = now_s
        while self._needed and self._needed[-1][1] <= needed:
            self._needed.pop()
        self._needed.append((now_s, needed))
        while self._needed[0][0] < now_s - self._config.shrink_cooldown_s:
            self._needed.popleft()
        return self._needed[0][1]


class _Turn:
    """One decision."""

    def __init__(self, planner: Planner, observation: Observation, now_s: float, num_owned: int | None) -> None:
        self._planner, self._observation, self._now_s = planner, observation, now_s
        config, bounds = planner._config, planner._bounds
        pending = planner._pending
        self._pending, self._bounds, self._config = pending, bounds, config
        going = set(pending.draining)
        self._live = {role: [w for w in observation.live(role) if w.name not in going] for role in _OTHER}
        self.have = Split(len(self._live[Role.PREFILL]), len(decoders_of_live(observation, going)))
        self.starting = pending.starting_roles(observation)
        known = sum(1 for w in observation.workers if not w.is_draining and w.name not in going)
        # Workers that die and are restarted are not seen for a while, and take their places again.
        self.present = max(known + len(self.starting), num_owned or 0)
        self.leaving = sum(1 for w in observation.workers if w.is_draining or w.name in going)
        self._needs: Needs = needs_of(config, observation, planner._estimates)
        self.now = bounds.within(
            Split(self._needs.prefill_now(self.have.prefill), self._needs.decode_now()),
        )
        self.later = bounds.within(
            Split(
                self._needs.prefill_later(self.have.prefill),
                max(self.now.decode, self._needs.decode_later()),
            )
        )
        more = config.hysteresis_fraction
        self.with_hysteresis = bounds.within(
            Split(
                max(self.later.prefill, self._needs.prefill_now(self.have.prefill, more)),
                max(self.later.decode, self._needs.decode_now(more)),
            )
        )
        self._refusal = planner.refusal(now_s)
        self.in_window = planner._most_needed(self.with_hysteresis.total, now_s)

    def terms(self) -> Terms:
        counts = {
            "have_decode": self.have.decode,
            "needed_prefill": self.now.prefill,
            "needed_decode": self.now.decode,
            "needed_prefill_forecast": self.later.prefill,
            "needed_decode_forecast": self.later.decode,
            "needed_in_window": self.in_window,
            "starting": len(self.starting),
            "draining": self.leaving,
        }
        return terms_of(self._needs, self._planner._estimates, self._observation, counts)

    def choose(self) -> tuple[Action, str]:
        for rule in (self._stop, self._change_role, self._start, self._drain):
            found = rule()
            if found is not None:
                return found
        return HOLD, self._why_not()

    # ------------------------------------------------------------------ rules

    def _stop(self) -> tuple[Action, str] | None:
        for name in self._pending.draining:
            worker = self._observation.find(name)
            if worker is not None and worker.is_draining and worker.is_empty and not worker.goes_after:
                return Stop(name), f"{name} drained and has no work"
        return None

    def _change_role(self) -> tuple[Action, str] | None:
        cooling = self._now_s - self._planner._role_changed_s < self._config.role_cooldown_s
        if self._pending.changes_role or cooling:
            return None
        for role, other in _OTHER.items():
            reason = self._gains(role)
            if reason is not None and self._live[other]:
                worker = min(self._live[other], key=work_of)
                return ChangeRole(worker.name, role), f"{worker.name} becomes {role.value}: {reason}"
        return None

    def _gains(self, role: Role) -> str | None:
        """Why one worker should take this role now; None: it should not."""
        have, want, other = self.have, self.now, _OTHER[role]
        if have.of(role) >= want.of(role) or have.of(other) <= self._bounds.least(other):
            return None
        if have.of(role) + self.starting.count(role) >= self._bounds.largest(role):
            return None
        after = have.moved(role)
        if self._spare(other) >= 1:
            return (
                f"needs {want.of(role)}, has {have.of(role)}; {other.value} needs {want.of(other)} of {have.of(other)}"
            )
        # While workers can be started at once, that comes first: a worker that moves makes the other role short.
        if have.total < want.total and (
            self._pending.changes_machines or self.present + self.leaving >= self._bounds.most or self._refusal
        ):
            target = divided(want, have.total, self._bounds)
            if after.of(role) <= target.of(role) and is_better(after, have, want, self._config.hysteresis_fraction):
                return (
                    f"{want.prefill} prefill and {want.decode} decode workers are needed and {have.total} are there: "
                    f"{target.prefill} and {target.decode} share the lack"
                )
        return None

    def _spare(self, role: Role) -> int:
        """Workers that a role could do without, also with the hysteresis' load more."""
        more = self._config.hysteresis_fraction
        have = self.have.of(role)
        if role is Role.PREFILL:
            return have - max(self._bounds.least(role), self._needs.prefill_now(have, more))
        return have - max(self._bounds.least(role), self._needs.decode_now(more))

    def _start(self) -> tuple[Action, str] | None:
        if self._pending.changes_machines or self._pending.changes_role or self._refusal:
            return None
        room = self._bounds.most - self.present - self.leaving
        fewest = self._bounds.fewest if self._config.max_workers is not None else 0
        count = min(room, max(self.later.total, fewest) - self.present)
        if count <= 0:
            return None
        roles, have = list[Role](), self.have
        for _ in range(count):
            lacks = {role: self.later.of(role) - have.of(role) for role in _OTHER}
            role = max(_OTHER, key=lambda each: lacks[each])
            roles.append(role)
            have = have.grown(role)
        if self.later.total <= self.present:
            return Start(tuple(roles)), f"{self.present} workers are there, and {fewest} are the fewest"
        return Start(tuple(roles)), (
            f"in {self._config.start_up_s:g} s {self.later.prefill} prefill and {self.later.decode} decode workers are "
            f"needed, and {self.present} are there"
        )

    def _drain(self) -> tuple[Action, str] | None:
        surplus = self.present - max(self.in_window, self._bounds.fewest)
        if surplus <= 0 or self._pending.changes_machines or self._pending.changes_role or self._cools_for_s() > 0:
            return None
        have, names = self.have, list[str]()
        for _ in range(surplus):
            spare = {role: have.of(role) - max(self.now.of(role), self._bounds.least(role)) for role in _OTHER}
            can_go = {
                role: [w for w in self._live[role] if w.name not in names and w.goes_after in ("", *names)]
                for role in _OTHER
            }
            role = max(_OTHER, key=lambda each: spare[each] if can_go[each] else 0)
            if spare[role] <= 0 or not can_go[role]:
                break
            names.append(min(can_go[role], key=work_of).name)
            have = have.shrunk(role)
        if not names:
            return self._make_way()
        cooldown_s = self._config.shrink_cooldown_s
        reason = f"{self.in_window} workers were enough for {cooldown_s:g} s, and {self.present} are there"
        return Drain(tuple(names)), reason

    def _make_way(self) -> tuple[Action, str] | None:
        """Let a role that can spare a worker give it to the other one, whose worker is the next that can go."""
        if self._now_s - self._planner._role_changed_s < self._config.role_cooldown_s:
            return None
        for role, other in _OTHER.items():
            spare = self.have.of(role) - max(self.now.of(role), self._bounds.least(role))
            next_to_go = [worker for worker in self._live[other] if not worker.goes_after]
            has_room = self.have.of(other) < self._bounds.largest(other)
            if spare > 0 and next_to_go and has_room and self._live[role]:
                name = min(self._live[role], key=work_of).name
                return ChangeRole(name, other), f"{name} becomes {other.value}: {next_to_go[0].name} goes next"
        return None

    def _cools_for_s(self) -> float:
        """Seconds until workers may go."""
        since_s = self._planner._watched_since_s
        begun_s = max(self._now_s if since_s is None else since_s, self._planner._machines_changed_s)
        return begun_s + self._config.shrink_cooldown_s - self._now_s

    def _why_not(self) -> str:
        if self._pending.failures:
            return "; ".join(self._pending.failures)
        if self._refusal and self.later.total > self.present:
            return f"{self.later.total} workers are needed, {self.present} are there, and no more come: {self._refusal}"
        if self._needs.prefill is None:
            return "no worker has measured its prefill speed yet"
        if self.later.total > self.present + self.leaving and self.present + self.leaving >= self._bounds.most:
            return f"{self.later.total} workers are needed, and {self._bounds.most} are the most"
        if self.present > self.in_window:
            return f"{self.present} are there, {self.in_window} were enough; cool-down or an action under way"
        if self._needs.is_out_of_reach:
            return "one prompt alone takes longer than the target for the first token: more workers cannot help it"
        return f"{self.now.prefill} prefill and {self.now.decode} decode workers are needed and there"
