"""Engine core: commands in, decisions out. Pure: knows no clock, thread, tensor or network.

    handle(command) ──▶ scheduler, pool, prefix cache ──▶ events for the face, operations for the store
    tick(now)       ──▶ deadlines, admission
    plan()  ──▶ StepPlan ──▶ (runner or simulator) ──▶ StepResult ──▶ apply(plan, result)

Commands may come late, twice, or for a sequence in another state, because a peer's message can cross with an end: those
are ignored and counted, and are no error. One step runs at a time; an action that would free the blocks of a sequence
in the running step waits for `apply`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from ..core.buckets import STEP_TOKENS
from ..core.errors import DeadlineExceeded, InternalError, InvalidRequest, NonFiniteKv
from ..core.request import FinishReason, Role, SequenceKey
from ..core.tally import Tally
from ..kv.cache.pool import BlockPool
from ..kv.cache.prefix import PrefixCache
from ..kv.cache.states import StatePool
from .cache_manager import KvCacheManager
from .commands import Commands
from .lifecycle import SequenceLifecycle
from .link.messages import (
    AskSnapshot,
    CoreCommand,
    Event,
    FetchBlocks,
    LoadNews,
    Progress,
    ReadKv,
    SetRole,
    Source,
    StepTokens,
    Stop,
    Submit,
    TokenNews,
)
from .plan import SequenceStep, StepPlan, StepResult
from .policy import Policy
from .report import load_news
from .scheduler import Scheduler
from .sequence import QUEUE_STATES, PendingFinish, Sequence, SequenceState
from .speculation.draft_model.plan import DraftPlan, DraftResult
from .speculation.speculation import Speculation
from .states import StateHoldings
from .step_times import StepTimes
from .store_ops import StoreOp
from .swap import SwapSpace

_S = SequenceState


@dataclass(frozen=True, slots=True)
class CoreLimits:
    """Bounds that come with the model."""

    max_model_len: int | None = None  # prompt plus generated tokens
    num_swap_blocks: int = 0  # host blocks for preempted sequences; 0: they are recomputed
    max_scored_rows: int | None = None  # most prompt rows per step with logprobs: `policy.scored_rows`; None: no bound
    num_states: int = 0  # recurrent states of a model that has some; 0: it has none
    num_seats: int = 0  # most sequences that run at once; used with `num_states`


class EngineCore:
    """All decisions of one worker's engine. Not thread-safe: only one thread may use it."""

    def __init__(
        self,
        limits: CoreLimits,
        pool: BlockPool,
        prefix: PrefixCache,
        policy: Policy,
        *,
        eos_ids: Collection[int],
        key: bytes,
        roles: Mapping[Role, Policy] | None = None,
        speculation: Speculation | None = None,
    ) -> None:
        """`roles`: the policy of each role that a `SetRole` may ask for. `speculation` None: no token is guessed."""
        self.prefix = prefix
        self.stopped = False  # a Stop came: new sequences are refused
        swap = SwapSpace(limits.num_swap_blocks, pool.block_tokens) if limits.num_swap_blocks else None
        states = None
        if limits.num_states:
            assert swap is None, "states are not swapped"
            assert speculation is None, "a state cannot go back behind a wrong guess"
            states = StateHoldings(StatePool(limits.num_states, pool.block_tokens), pool.block_tokens, limits.num_seats)
        planner = None if speculation is None else speculation.planner
        drafts = None if planner is None else planner.holdings
        holdings = KvCacheManager(pool, prefix, key, swap, states, drafts=drafts)
        self._scheduler = Scheduler(holdings, policy, limits.max_scored_rows, speculation)
        self._lives = SequenceLifecycle(self._scheduler, frozenset(eos_ids))
        self._commands = Commands(self._lives, limits.max_model_len)
        self._roles = dict(roles or {})
        self._num_steps = 0
        self._step_tokens = Tally(STEP_TOKENS)
        self._planned_s = 0.0

    # ------------------------------------------------------------------ commands, time, steps

    def handle(self, command: CoreCommand, now_s: float) -> list[Event | StoreOp]:
        """Apply one command. The caller executes the returned store operations before its next call."""
        lives = self._lives
        lives.holdings.residency.now_s = now_s
        if isinstance(command, Submit):
            self._commands.submit(command, now_s, stopped=self.stopped)
        elif isinstance(command, ReadKv):
            self._commands.read(command)
        elif isinstance(command, FetchBlocks):
            self._commands.fetch(command)
        elif isinstance(command, AskSnapshot):
            lives.collect_news()
            lives.outbox.append(lives.holdings.snapshot())
        elif isinstance(command, SetRole):
            self.set_policy(self._roles[command.role])
        elif isinstance(command, Stop):
            self.stopped = True
            for sequence in list(self._scheduler.by_key.values()):
                lives.end(sequence, PendingFinish(FinishReason.CANCELLED))
        else:
            self._commands.change(command)
        return lives.drain()

    def tick(self, now_s: float) -> list[Event | StoreOp]:
        """End sequences past their deadline and admit those that may begin. Call it before every `plan`."""
        self._lives.holdings.residency.now_s = now_s
        for sequence in list(self._scheduler.by_key.values()):
            if sequence.deadline_s is not None and sequence.deadline_s <= now_s:
                message = f"the deadline passed while the request was {sequence.state.name.lower()}"
                self._lives.end(sequence, PendingFinish(FinishReason.ERROR, DeadlineExceeded.code, message))
        self._lives.outbox += self._scheduler.admit()
        self._lives.collect_news()
        return self._lives.drain()

    def plan_drafts(self, now_s: float) -> DraftPlan | None:
        """What a draft model or heads compute before the next step: call it before `plan`, and nothing else.

        Answer it by `take_drafts`, also before `plan`; a plan that is not answered gives no guesses.
        """
        assert not self._lives.in_step, "the last step has not been applied"
        self._lives.holdings.residency.now_s = now_s
        return self._scheduler.choose()

    def take_drafts(self, plan: DraftPlan, result: DraftResult) -> None:
        """Take what they have computed."""
        planner = self._scheduler.guess_planner
        assert planner is not None, "nothing was asked to guess"
        planner.take(self._scheduler.by_key, plan, result)
        self._lives.counters["draft_model_caught_up_tokens"] += plan.catch_up.num_tokens
        self._lives.counters["draft_model_failures"] += len(result.unusable)

    def plan(self, now_s: float) -> StepPlan | None:
        """The next step, or None if no sequence can run. Every plan is answered by `apply` or `fail_step`.

        Planning may preempt sequences: execute the operations of `drain` before the step runs, also if it is None.
        """
        assert not self._lives.in_step, "the last step has not been applied"
        self._planned_s = self._lives.holdings.residency.now_s = now_s
        plan = self._scheduler.plan()
        self._lives.outbox += self._scheduler.take_swap_ops()
        if plan is not None:
            self._lives.in_step = frozenset(step.key for step in plan.sequences)
        return plan

    def apply(self, plan: StepPlan, result: StepResult, now_s: float) -> list[Event | StoreOp]:
        """Apply the result of a step."""
        assert plan.step == result.step, f"step {plan.step} was planned, {result.step} came back"
        lives = self._lives
        lives.in_step = frozenset()
        lives.holdings.residency.now_s = now_s
        self._num_steps += 1
        self._step_tokens.add(sum([len(step.token_ids) + len(step.draft_ids) for step in plan.sequences]))
        news: list[TokenNews] = []
        progress: list[Progress] = []
        ends: list[tuple[Sequence, PendingFinish]] = []
        for step, token_ids in zip(plan.sequences, result.tokens, strict=True):
            sequence = self._scheduler.by_key[step.key]
            doom, is_computed = sequence.doom, False
            if sequence.began_s is None:
                sequence.began_s = self._planned_s
            if step.key in result.non_finite:
                doom = doom or PendingFinish(
                    FinishReason.ERROR, NonFiniteKv.code, "a key, a value or a logit was not finite"
                )
            elif step.key in result.failed:
                doom = doom or PendingFinish(FinishReason.ERROR, InternalError.code, result.failed[step.key])
            elif step.key in result.refused:
                doom = doom or PendingFinish(FinishReason.ERROR, InvalidRequest.code, result.refused[step.key])
            else:
                is_computed = True
                sequence.num_computed = step.end
                if step.key in result.deferred:
                    sequence.num_computed = lives.holdings.before_last(step)
                    lives.drop_drafts(sequence)
            if doom is None:
                doom = self._take_tokens(sequence, step, result, token_ids, news)
                if sequence.source is Source.FOR_PEER:
                    began = not sequence.has_begun
                    progress.append(Progress(sequence.key, sequence.num_computed, began, sequence.began_s))
                    sequence.has_begun = True
            if is_computed:
                lives.holdings.publish(sequence)
                lives.holdings.keep_state(sequence, step)
            if doom is not None:
                ends.append((sequence, doom))
            elif is_computed and self._scheduler.speculation is not None:
                self._scheduler.speculation.computed(sequence, step)
        if news:
            lives.outbox.append(StepTokens(plan.step, tuple(news)))
            lives.counters["generated_tokens"] += sum([len(tokens.token_ids) for tokens in news])
        lives.outbox += progress
        for sequence, doom in ends:
            lives.finish(sequence, doom)
        lives.collect_news()
        return lives.drain()

    def fail_step(self, plan: StepPlan, code: str, message: str) -> list[Event | StoreOp]:
        """The step failed: its sequences end, and the KV that it may have written is not published."""
        self._lives.in_step = frozenset()
        for step in plan.sequences:
            sequence = self._scheduler.by_key[step.key]
            self._lives.finish(sequence, sequence.doom or PendingFinish(FinishReason.ERROR, code, message))
        self._lives.collect_news()  # taking its blocks may have evicted prefixes, and no later call may report that
        return self._lives.drain()

    def fail(self, key: SequenceKey, code: str, message: str) -> list[Event | StoreOp]:
        """End one sequence with an error, e.g. because the store refused its planes."""
        sequence = self._lives.get(key)
        if sequence is not None:
            self._lives.end(sequence, PendingFinish(FinishReason.ERROR, code, message))
        return self._lives.drain()

    def swap_failed(self, key: SequenceKey) -> list[Event | StoreOp]:
        """A `SwapOutOp` or `SwapInOp` failed, or its digests do not match: recompute the sequence.

        Call it before any other method, so that no copied block is published or attended to. If no step runs, the
        sequence is admitted at once if possible, because an otherwise idle engine would sleep.
        """
        sequence = self._lives.get(key)
        if sequence is not None:
            assert key not in self._lives.in_step, f"{key} is computed before its blocks came back"
            self._lives.counters["swaps_failed"] += 1
            self._scheduler.recompute(sequence)
            if not self._lives.in_step:
                self._lives.outbox += self._scheduler.admit()
        return self._lives.drain()

    def drain(self) -> list[Event | StoreOp]:
        """Events and operations that are not returned yet: call it after `plan`, and after a call that raised."""
        return self._lives.drain()

    # ------------------------------------------------------------------ policy and reports

    @property
    def policy(self) -> Policy:
        """The present scheduling policy."""
        return self._scheduler.policy

    def set_policy(self, policy: Policy) -> None:
        """Change the policy. Live sequences continue; later decisions are the new policy's."""
        self._scheduler.policy = policy

    def set_times(self, times: StepTimes) -> None:
        """Set the measured step times, from which the policy bounds the prompt tokens beside decodes."""
        self._scheduler.times = times

    def time_step(self, plan: StepPlan, result: StepResult, took_ms: float) -> None:
        """Tell how long a step took: speculation switches itself off where it does not pay.

        `took_ms` includes what the guesses took, without the draft model's catch-up.
        """
        if self._scheduler.speculation is not None:
            self._scheduler.speculation.observe(plan, result, took_ms)

    def time_catch_up(self, plan: DraftPlan, took_ms: float) -> None:
        """Tell how long `plan.catch_up` took, which bounds the next one."""
        planner = self._scheduler.guess_planner
        assert planner is not None, "nothing was asked to guess"
        planner.caught_up(plan.catch_up.num_tokens, took_ms)

    def is_for_peers(self, plan: StepPlan) -> bool:
        """True if a plan computes a prompt for a decode worker."""
        by_key = self._scheduler.by_key
        return any(by_key[step.key].source is Source.FOR_PEER for step in plan.sequences)

    @property
    def num_live(self) -> int:
        """Number of sequences that have not ended."""
        return len(self._scheduler.by_key)

    @property
    def num_waiting(self) -> int:
        """Number of sequences in states without blocks."""
        return self._scheduler.count(*QUEUE_STATES)

    @property
    def counters(self) -> Counter[str]:
        """Event counts since the start."""
        return self._lives.counters

    def states(self) -> dict[SequenceKey, SequenceState]:
        """State of every live sequence, for tests, `status` and the simulator."""
        return {key: sequence.state for key, sequence in self._scheduler.by_key.items()}

    def next_deadline_s(self) -> float | None:
        """Latest time of the next `tick` call, if no other event happens; None: no deadline."""
        deadlines = [s.deadline_s for s in self._scheduler.by_key.values() if s.deadline_s is not None]
        return min(deadlines, default=None)

    @property
    def num_blocks(self) -> int:
        """Number of blocks of the pool, of host memory or of the draft model's pool, the largest of them."""
        holdings = self._lives.holdings
        others = [other.pool.num_blocks for other in (holdings.swap, holdings.drafts) if other is not None]
        return max(holdings.pool.num_blocks, *others, 0)

    def check_integrity(self, among: range | None = None) -> None:
        """Prove that pool, prefix cache, promises and states agree.

        `among`: numbers of the blocks to check, in the pool and in host memory; None: all.

        Raises:
            AssertionError: names the fault.
        """
        self._scheduler.check_integrity(among)
        for sequence in self._scheduler.by_key.values():
            assert sequence.doom is None or sequence.key in self._lives.in_step, f"{sequence.key} is doomed, lives on"

    def load(self, now_s: float) -> LoadNews:
        """Values of a beat; the engine loop sets phase and coefficients, which need a clock."""
        return load_news(self._scheduler, self.counters, self._num_steps, self._step_tokens)

    def _take_tokens(
        self,
        sequence: Sequence,
        step: SequenceStep,
        result: StepResult,
        token_ids: tuple[int, ...],
        news: list[TokenNews],
    ) -> PendingFinish | None:
        """Append the sampled tokens and their event for the face; returns the end of the sequence, or None.

        Tokens after one that ends the sequence are dropped.
        """
        least = int(step.samples and step.key not in result.deferred)
        most = least + len(step.draft_ids)
        assert least <= len(token_ids) <= most, f"{step.key}: {len(token_ids)} tokens, {least} to {most} were to come"
        if sequence.scores is not None:  # after a preemption some are known already: append only the others
            sequence.scores += result.prompt_logprobs.get(step.key, ())[max(len(sequence.scores) - step.start, 0) :]
        if not token_ids:
            return None
        first_index, logprobs = sequence.num_generated, result.logprobs.get(step.key, ())
        scores = tuple(sequence.scores or ())
        began_s = sequence.began_s if sequence.source is Source.FOR_PEER else None
        doom = self._lives.accept(sequence, token_ids[0])
        if step.draft_ids:
            doom, token_ids = self._lives.accept_drafts(sequence, step, token_ids, doom)
            logprobs = logprobs[: len(token_ids)]
        news.append(TokenNews(sequence.key, first_index, token_ids, logprobs, scores, began_s))
        if sequence.source is Source.FOR_PEER:
            self._scheduler.move(sequence, _S.HELD)  # even if the token ends the choice: decode fetches, then releases
            return None
        if doom is None and sequence.state is _S.PREFILLING:
            self._scheduler.move(sequence, _S.DECODING)
        return doom
