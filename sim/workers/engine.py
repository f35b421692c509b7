"""One worker's engine in virtual time: the production core and its turns, with a store that checks.

Commands and events cross the link with a delay; a step takes time. Knows no hand-over and no request.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from ...core.errors import InternalError, RankLost, TwostrokeError
from ...core.request import CacheScope, SamplingParams, SequenceKey
from ...engine import rank_store
from ...engine.core import CoreLimits, EngineCore
from ...engine.link.messages import AdapterCommand, Command, Ended, Event, LoadNews, Offered, Promised, Submit
from ...engine.link.plan_stream import PlanReceiver, PlanSender
from ...engine.plan import StepPlan, StepResult
from ...engine.speculation.speculation import Speculation
from ...engine.store_ops import StoreOp
from ...engine.turn import Turn
from ...kv.cache.pool import BlockPool
from ...kv.cache.prefix import PrefixCache
from ...kv.keys import PromptHasher
from ..invariants import Violation, check_core, check_deadlines, check_promises, check_travelled
from ..setting import DOMAINS, Setting, WorkerSetting
from ..world import Process, Timer, World
from .cells import mix, spec_of
from .store import EOS, VOCABULARY, DraftModel, DraftSetting, Known, Ledger, Store

IDENTITY_KEY = b"sim"
FINGERPRINT = b"weights"
NUMERICS = b"numerics"
DEADLINE_SLACK_S = 0.5


_HASHER = PromptHasher(IDENTITY_KEY, FINGERPRINT, NUMERICS)
_DOMAIN_BY_ROOT = {_HASHER.root(CacheScope(domain, b"")): domain for domain in DOMAINS}


@dataclass(frozen=True, slots=True)
class Guesses:
    """Implements `Proposer` of engine/speculation/: right and wrong guesses, a function of the tokens before."""

    store: Store
    rate: float  # of right ones
    key: SequenceKey
    params: SamplingParams

    def propose(self, tokens: Sequence[int], most: int) -> tuple[int, ...]:
        """Implements `Proposer.propose`."""
        right = self.store.guess(self.key, tokens, self.params.seed, most)
        luck = [mix(len(tokens) + place, tokens[-1]) % 1000 < 1000 * self.rate for place in range(most)]
        return tuple([(id_ if is_right else id_ + 1) % VOCABULARY for id_, is_right in zip(right, luck, strict=True)])


class Engine:
    """Implements the sending half of engine/link/client.py's FaceLink; its events go to `tell`, on the face's side."""

    def __init__(self, world: World, process: Process, setting: Setting, worker: WorkerSetting, ledger: Ledger) -> None:
        noise = mix(int.from_bytes(worker.worker_id.encode(), "little"), process.life) if setting.is_noisy else 0
        self.pool = BlockPool(worker.num_blocks, worker.block_tokens)
        self.prefix = PrefixCache(self.pool, windowed=spec_of(setting.window).main.windowed)
        self.store = Store(
            world,
            self.pool,
            ledger,
            noise=noise,
            read_damage=setting.read_damage,
            swap_damage=setting.swap_damage,
            window=setting.window,
            heads=setting.heads,
            num_ranks=worker.num_ranks,
        )
        limits = CoreLimits(num_swap_blocks=worker.num_swap_blocks)
        speculation, drafts = None, None
        if setting.num_speculative and setting.draft_blocks:
            rates = setting.right_guesses, setting.step_failure
            drawn = DraftSetting(setting.draft_blocks, setting.draft_chunk, *rates)
            drafts = DraftModel(world, self.store, drawn, worker.block_tokens)
            speculation = Speculation(drafts.planner, setting.num_speculative, "draft_model")
        elif setting.num_speculative:
            start = partial(Guesses, self.store, setting.right_guesses)
            speculation = Speculation(start, setting.num_speculative)
        self.core = EngineCore(
            limits,
            self.pool,
            self.prefix,
            worker.policy(),
            eos_ids=[EOS],
            key=IDENTITY_KEY,
            speculation=speculation,
        )
        draft = None if drafts is None else drafts.draft
        self._turns = Turn(self.core, self.store, self._emit, self._refused, draft)
        self.group_lost: Callable[[str], None] = lambda _: None  # called when a rank is lost: all of them end
        self.tell: Callable[[Sequence[Event]], None] = lambda _: None
        self.dies_of: Callable[[StepPlan], bool] = lambda _: False  # True: the process is dead now
        self._world = world
        self._process = process
        self._ledger = ledger
        self._worker = worker
        self._step_failure = setting.step_failure
        self._inbox: deque[Command] = deque()
        self._plan: StepPlan | None = None  # the step under way
        self._sender, self._receiver = PlanSender(), PlanReceiver()
        self._turn_due: Timer | None = None
        self._deadline_due: Timer | None = None
        self.num_turns = 0
        self._num_checked = 0
        self._num_untold = 0  # batches of events on their way to the face

    @property
    def num_live(self) -> int:
        """Number of sequences that have not ended."""
        return self.core.num_live + sum(isinstance(command, Submit) for command in self._inbox)

    @property
    def has_waiting_commands(self) -> bool:
        """True while commands of the face wait for the core."""
        return bool(self._inbox)

    @property
    def is_telling(self) -> bool:
        """True while events of the core are on their way to the face."""
        return self._num_untold > 0

    def send(self, command: Command) -> None:
        """Queue a command of the face; never waits."""
        self._inbox.append(command)
        self._wake(self._worker.link_s)

    async def receive(self) -> Sequence[Event]:
        """Not used: events come through `tell`."""
        raise NotImplementedError

    def load(self) -> LoadNews:
        """Load values that a beat carries."""
        return self.core.load(self._world.now_s())

    def check(self) -> None:
        """Check K1, K2 and R7 of this worker. Only a turn can change the result of K1 and K2."""
        if self.num_turns != self._num_checked:
            self._num_checked = self.num_turns
            check_core(self._process.name, self.core, self.pool)
        slack_s = DEADLINE_SLACK_S + self._process.frozen_s
        check_deadlines(self._process.name, self.core, self._world.now_s(), slack_s)

    def check_findable(self) -> None:
        """Check K7: every findable block holds the KV of its identity."""
        for identity in self.prefix.snapshot():
            block = self.prefix.locate(identity)
            assert block is not None, identity
            self.store.check_findable(identity, block, lacks_windows=self.prefix.lacks_windows(block))

    # ------------------------------------------------------------------ the loop

    def _wake(self, delay_s: float) -> None:
        if self._turn_due is None:
            self._turn_due = self._world.after(delay_s, self._process, self._turn)

    def _turn(self) -> None:
        """Run one turn of the loop: take the commands, then plan a step and let its time pass."""
        self._turn_due = None
        try:
            self._take_turn()
        except RankLost as lost:
            self.group_lost(str(lost))

    def _take_turn(self) -> None:
        self.num_turns += 1
        if self._plan is not None:
            if self._worker.is_overlapping:
                self._take_commands()
            return
        self._take_commands()
        now_s = self._world.now_s()
        plan = self._turns.plan(now_s)
        if plan is None:
            self._arm()
            return
        self._plan = plan
        low_s, high_s = self._worker.step_s
        self._world.after(self._world.random.uniform(low_s, high_s), self._process, self._finish_step)

    def _take_commands(self) -> None:
        while self._inbox:
            command = self._inbox.popleft()
            if isinstance(command, Submit):
                self._know(command)
            assert not isinstance(command, AdapterCommand), "simulated workers have their adapters from the start"
            self._turns.take(command, self._world.now_s())

    def _know(self, submit: Submit) -> None:
        """Tell the store which tokens this sequence must contain."""
        if submit.key not in self.store.known:
            domain = _DOMAIN_BY_ROOT[submit.identity_root]
            known = self.store.known[submit.key] = Known.of(domain, submit.prompt_ids)
            self._ledger.named(submit.identities, known.cells)

    def _finish_step(self) -> None:
        try:
            self._finish()
        except RankLost as lost:
            self.group_lost(str(lost))

    def _finish(self) -> None:
        plan, self._plan = self._plan, None
        assert plan is not None
        if self.dies_of(plan):
            return
        self.num_turns += 1
        now_s = self._world.now_s()
        if self._world.chance(self._step_failure):
            self._world.note(self._process, f"step {plan.step} fails")
            self._turns.fail(plan, InternalError.code, "the step failed")
        else:
            travelled, ranks = self._travelled(plan), self.store.ranks
            result = (
                rank_store.together(ranks, lambda: self.store.run(travelled)) if ranks else self.store.run(travelled)
            )
            if ranks is not None and ranks.lost is not None:
                raise Violation("R13", f"{self._process}: a step counts that rank {ranks.lost} did not do")
            self._world.note(self._process, f"step {plan.step}: {_described(plan, result)}")
            self._turns.apply(plan, result, now_s)
        self._turn()

    def _travelled(self, plan: StepPlan) -> StepPlan:
        """The plan as a rank of another process gets it."""
        travelled = self._receiver.decode(self._sender.encode(plan))
        check_travelled(self._process.name, plan, travelled)
        return travelled

    def _arm(self) -> None:
        """Set the timer of the next deadline; the engine is idle."""
        if self._deadline_due is not None:
            self._deadline_due.cancel()
        due_s = self.core.next_deadline_s()
        if due_s is not None:
            self._deadline_due = self._world.after(due_s - self._world.now_s(), self._process, lambda: self._wake(0.0))

    # ------------------------------------------------------------------ towards the face

    def _emit(self, events: Sequence[Event]) -> None:
        for event in events:
            if isinstance(event, Promised | Offered):
                check_promises(self._process.name, self.core, self.pool, self._worker.most_taken)
        if events:
            self._num_untold += 1
            self._world.after(self._worker.link_s, self._process, lambda: self._tell(events))

    def _tell(self, events: Sequence[Event]) -> None:
        self._num_untold -= 1
        self.tell(events)
        for event in events:
            if isinstance(event, Ended):  # forgotten only now: frames read earlier may leave until the face hears this
                self.store.known.pop(event.key, None)

    def _refused(self, op: StoreOp, error: Exception | None) -> None:
        """Record a failed operation. Damage is part of the schedule; any other error of the store is a finding."""
        if isinstance(error, RankLost):
            raise error
        if error is not None and not isinstance(error, TwostrokeError):
            raise error
        self._world.note(self._process, f"{type(op).__name__} {op.token_start}+{op.token_count}: {error or 'damaged'}")


def _described(plan: StepPlan, result: StepResult) -> str:
    parts = []
    for step, tokens in zip(plan.sequences, result.tokens, strict=True):
        sampled = f" -> {' '.join(map(str, tokens))}" if tokens else ""
        parts.append(f"{step.key.request_id}#{step.key.choice} {step.start}+{step.num_tokens}{sampled}")
    return ", ".join(parts)
