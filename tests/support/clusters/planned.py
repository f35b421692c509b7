"""A toy cluster that carries out the planner's decisions, and transcripts of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from twostroke.cluster.planner.config import PlannerConfig
from twostroke.cluster.planner.decision import ChangeRole, Decision, Drain, Hold, Start, Stop
from twostroke.cluster.planner.law import Planner
from twostroke.cluster.planner.observation import Observation, Prompts, WorkerReport
from twostroke.core.request import Role

BASE_MS, SLOPE = 10.0, 2e-4
MS_PER_TOKEN, PROMPT = 0.1, 1000  # one worker computes ten prompts a second


@dataclass
class _Draining:
    until_s: float


class Toy:
    """Workers whose queues follow from the load at once: `work` in workers, `kv` in KV tokens per ms."""

    def __init__(
        self, config: PlannerConfig, prefill: int, decode: int, stream_s: float = 3.0, *, is_ordered: bool = False
    ) -> None:
        """`is_ordered`: those that began with a role, or were started for it, go from the last one on."""
        self._is_ordered = is_ordered
        self._owner: dict[str, Role] = {}
        self.planner = Planner(config, prefill + decode)
        self.now_s = 0.0
        self.workers: dict[str, Role] = {}
        self.starting: list[tuple[float, Role]] = []
        self.draining: dict[str, _Draining] = {}
        self.done: list[Decision] = []
        self.stopped_with_work = 0
        self._config, self._stream_s = config, stream_s
        self._work = self._kv = self._backlog = 0.0
        self._prompts = Prompts()
        self._made = 0
        for role, count in ((Role.PREFILL, prefill), (Role.DECODE, decode)):
            for _ in range(count):
                self._add(role)

    def load(self, work: float, kv: float) -> None:
        self._work, self._kv = work, kv

    def serving(self, role: Role) -> list[str]:
        return [name for name, each in self.workers.items() if each is role and name not in self.draining]

    def second(self) -> Decision:
        self.now_s += 1.0
        for ready_s, role in [each for each in self.starting if each[0] <= self.now_s]:
            self.starting.remove((ready_s, role))
            self._add(role)
        new = round(self._work * 1000 / MS_PER_TOKEN / PROMPT)
        old = self._prompts
        self._prompts = Prompts(old.count + new, old.tokens + new * PROMPT, old.tokens_squared + new * PROMPT * PROMPT)
        per_s = 1000 / MS_PER_TOKEN * len(self.serving(Role.PREFILL))
        self._backlog = max(0.0, self._backlog + new * PROMPT - per_s)
        decision = self.planner.decide(self.observation(), self.now_s)
        self._carry_out(decision)
        return decision

    def observation(self) -> Observation:
        return Observation(self.now_s, "toy", tuple(self._report(name) for name in sorted(self.workers)), self._prompts)

    def _add(self, role: Role) -> None:
        self.workers[f"worker-{self._made:02}"] = self._owner[f"worker-{self._made:02}"] = role
        self._made += 1

    def _report(self, name: str) -> WorkerReport:
        role = self.workers[name]
        going = self.draining.get(name)
        report = WorkerReport(
            name,
            role,
            "draining" if going else "live",
            kv_capacity_tokens=10_000_000,
            max_num_seqs=100_000,
            prefill_ms_per_token=MS_PER_TOKEN,
            goes_after=self._goes_after(name),
        )
        if going:
            return replace(report, running=1 if self.now_s < going.until_s else 0)
        if role is Role.PREFILL:
            return replace(report, queued_prompt_tokens=int(self._backlog / len(self.serving(role))))
        share = min(0.95, SLOPE * self._kv / len(self.serving(role)))
        step_ms = BASE_MS / (1 - share)
        kv = round(self._kv / len(self.serving(role)) * step_ms)
        return replace(report, running=1 if kv else 0, kv_tokens=kv, decode_step_ms=step_ms)

    def _goes_after(self, name: str) -> str:
        later = [each for each in sorted(self.workers) if each > name and self._owner[each] is self._owner[name]]
        return later[0] if self._is_ordered and later else ""

    def _carry_out(self, decision: Decision) -> None:
        action = decision.action
        if isinstance(action, Hold):
            return
        self.done.append(decision)
        if isinstance(action, ChangeRole):
            self.workers[action.worker] = action.role
        elif isinstance(action, Start):
            self.starting += [(self.now_s + self._config.start_up_s, role) for role in action.roles]
        elif isinstance(action, Drain):
            self.draining |= {name: _Draining(self.now_s + self._stream_s) for name in action.workers}
        elif isinstance(action, Stop):
            self.stopped_with_work += self.now_s < self.draining[action.worker].until_s
            assert not self._goes_after(action.worker), "another one would have been ended"
            del self.workers[action.worker], self.draining[action.worker]


def transcript(text: str) -> str:
    """Play a transcript: `config key=value …`, `workers P D`, `load WORK KV for SECONDS`; decisions are added."""
    values: dict[str, float] = {}
    toy: Toy | None = None
    said = []
    for line in text.splitlines():
        if line.startswith("    "):
            continue
        said.append(line)
        words = line.split()
        if not words or line.startswith("#"):
            continue
        if words[0] == "config":
            values = {key: float(value) for key, _, value in (word.partition("=") for word in words[1:])}
        elif words[0] == "workers":
            whole = {key: int(value) if "workers" in key else value for key, value in values.items()}
            toy = Toy(PlannerConfig(enabled=True, **whole), int(words[1]), int(words[2]))
        else:
            assert toy is not None
            assert words[0] == "load"
            toy.load(float(words[1]), float(words[2]))
            last = ""
            for _ in range(int(words[4])):
                decision = toy.second()
                if not isinstance(decision.action, Hold):
                    said.append(f"    {toy.now_s:.0f} {decision.action.name}: {decision.reason}")
                last = decision.reason
            said.append(f"    {toy.now_s:.0f} then: {last}")
    return "\n".join(said) + "\n"
