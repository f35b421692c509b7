"""One sequence of the scheduler: token ids, counts and a state. Knows no tensor, no clock, no queue.

    tokens   | prompt (its last num_emitted ids count as generated) | generated here |
    KV       |<---- computed, in blocks ---->|<- still to compute: a chunk, or one ->|
             0                          num_computed                           len(tokens)

The states, by source. Cancel, deadline and error lead to `ended` from every state; those arrows are not drawn.

    LOCAL     waiting ──▶ prefilling ──▶ decoding ──▶ ended
                 ▲             │ preempted   │
                 ├─────────────┴─────────────┤
                 └──damaged── swapped ◀──────┘        later back to its state: prefilling or decoding
    PEER      waiting ──▶ promised ──Bind──▶ bound ──KvComplete──▶ decoding ──▶ ended
                 │            │                │                      │ preempted: continues as LOCAL, waiting
                 └────────────┴────────────────┼──PrefillLocally──▶ LOCAL, waiting (or prefilling in its bound blocks)
                                               └──Release──▶ ended: what was written stays cached
    FOR_PEER  queued ──▶ offered ──PeerBound──▶ ready ──▶ prefilling ──▶ held ──Release──▶ ended
                            └──PeerNotYet──▶ parked ──PeerBound──▶ ready
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple

from ..core.request import FinishReason, SamplingParams, SequenceKey, TokenLogprobs
from ..kv.block import BlockId, BlockIdentity
from ..kv.spec import HASH_BLOCK_TOKENS
from .link.messages import Source, Submit
from .plan import History, StateMove
from .speculation.drafting import Drafting


class SequenceState(Enum):
    """State of a sequence; the module's docstring shows the transitions."""

    WAITING = auto()  # LOCAL, PEER: owns no blocks
    PROMISED = auto()  # PEER: its cached prefix is retained, room for the rest is counted but not taken
    BOUND = auto()  # PEER: blocks for the prompt and the first decode; the peer's KV arrives
    QUEUED = auto()  # FOR_PEER: owns no blocks
    OFFERED = auto()  # FOR_PEER: decode is asked to bind; room is counted here
    PARKED = auto()  # FOR_PEER: decode has no room now
    READY = auto()  # FOR_PEER: decode has bound; starts as soon as budget and blocks allow
    PREFILLING = auto()  # blocks for all known tokens are taken; chunks are computed
    DECODING = auto()  # all tokens but the last are computed
    HELD = auto()  # FOR_PEER: computed; blocks stay for the hand-over
    SWAPPED = auto()  # LOCAL: preempted; its computed KV is in host blocks
    ENDED = auto()


QUEUE_STATES = (
    SequenceState.WAITING,
    SequenceState.QUEUED,
    SequenceState.OFFERED,
    SequenceState.PARKED,
    SequenceState.READY,
    SequenceState.SWAPPED,
)
"""States without blocks; the bounds of the waiting queue count the sequences in them."""

_S = SequenceState
NEXT_STATES: dict[SequenceState, frozenset[SequenceState]] = {
    _S.WAITING: frozenset({_S.PROMISED, _S.PREFILLING}),
    _S.PROMISED: frozenset({_S.BOUND, _S.WAITING}),
    _S.BOUND: frozenset({_S.DECODING, _S.PREFILLING}),
    _S.QUEUED: frozenset({_S.OFFERED}),
    _S.OFFERED: frozenset({_S.READY, _S.PARKED}),
    _S.PARKED: frozenset({_S.READY}),
    _S.READY: frozenset({_S.PREFILLING}),
    _S.PREFILLING: frozenset({_S.DECODING, _S.HELD, _S.WAITING, _S.SWAPPED}),
    _S.DECODING: frozenset({_S.WAITING, _S.SWAPPED}),
    _S.SWAPPED: frozenset({_S.PREFILLING, _S.DECODING, _S.WAITING}),
    _S.HELD: frozenset(),
    _S.ENDED: frozenset(),
}
"""The drawn transitions as data; `ENDED` may follow every state but itself."""


@dataclass(frozen=True, slots=True)
class PendingFinish:
    """Decided end of a sequence, applied after the step that computes it."""

    reason: FinishReason
    error_code: str = ""
    error_message: str = ""


class Table(NamedTuple):
    """Blocks of a sequence from its first token on, and the generation of each."""

    blocks: tuple[BlockId, ...]
    generations: tuple[int, ...]


class Swapped(NamedTuple):
    """Tokens [start, end) of a sequence in host blocks, with their generations; the tokens before were shared."""

    start: int
    end: int
    blocks: tuple[BlockId, ...]
    generations: tuple[int, ...]
    lacking: frozenset[int] = frozenset()  # hash blocks without their windowed layers


@dataclass(slots=True, eq=False)
class Sequence:
    """A live sequence. Only the scheduler and the core change it."""

    key: SequenceKey
    source: Source  # PEER becomes LOCAL when its prompt is computed or recomputed here
    params: SamplingParams
    tokens: list[int]
    num_prompt: int
    num_emitted: int
    identities: list[BlockIdentity]  # of leading full hash blocks; grows as generated tokens fill blocks
    identity_root: bytes
    deadline_s: float | None
    rank: tuple[int, int]  # (-priority, arrival), the scheduler's order: the greatest is preempted first
    state: SequenceState
    prompt_ids: tuple[int, ...]  # without the tokens that earlier dispatches generated
    scores: list[TokenLogprobs] | None  # known logprobs of prompt ids from the second on; None: not wanted
    blocks: list[BlockId] = field(default_factory=list)  # owned, in order
    table: Table | None = None  # of `blocks`, until they change
    num_computed: int = 0
    likely_cached: int = 0  # leading tokens that were cached when it was added: an estimate only
    num_published: int = 0  # leading blocks that are published in the prefix cache
    num_promised: int = 0  # blocks promised to it and not taken yet
    cached_tokens: int = 0  # prompt tokens found here when it first began
    preemptions: int = 0
    last_step: int = -1  # last step that computed it
    written: set[int] = field(default_factory=set)  # BOUND: hash blocks whose KV arrived
    lacking: set[int] = field(default_factory=set)  # hash blocks whose KV is without its windowed layers
    swapped: Swapped | None = None  # SWAPPED: `num_computed` is its end
    wants_bind: bool = False
    has_begun: bool = False  # Promised (LOCAL) or the first Progress (FOR_PEER) was sent
    began_s: float | None = None  # planning time of the first step that computed it here
    drafting: Drafting | None = None  # of its guessed tokens; None: none were guessed so far
    doom: PendingFinish | None = None
    adapter_slot: int = 0  # 0: none
    state_place: int = (
        0  # its recurrent state, which covers `num_computed` tokens; 0: it covers none, or the model has none
    )
    move: StateMove | None = None  # states of the running step
    passing: tuple[int, BlockIdentity] | None = None  # its latest snapshot that its next one replaces
    wanted_states: set[int] = field(default_factory=set)  # numbers of tokens after which a snapshot is to be kept

    @property
    def num_generated(self) -> int:
        """Number of generated tokens of this choice, those of earlier dispatches included."""
        return self.num_emitted + len(self.tokens) - self.num_prompt

    @property
    def num_remaining(self) -> int:
        """Number of known tokens whose KV is not computed yet."""
        return len(self.tokens) - self.num_computed

    @property
    def num_expected(self) -> int:
        """Estimate of the tokens to be computed, made while it waits."""
        return self.num_remaining if self.num_computed else self.num_remaining - self.likely_cached

    @property
    def expected_pairs(self) -> float:
        """(query, key) pairs of `num_expected`: the part of their cost that grows with the square."""
        return self.num_expected * (len(self.tokens) - self.num_expected / 2)

    @property
    def tokens_to_hold(self) -> int:
        """Tokens that its blocks must cover to begin: the known ones, and the first decode unless a peer decodes."""
        return self.num_prompt if self.source is Source.FOR_PEER else len(self.tokens) + 1

    @property
    def num_skippable(self) -> int:
        """Most leading tokens that a cached prefix may cover: all before the first token whose logits are wanted."""
        return len(self.tokens) - 1 if self.scores is None else len(self.scores)

    @property
    def is_scored(self) -> bool:
        """True while logprobs of its prompt are wanted; its rows then take longer than plain ones."""
        return self.scores is not None

    @property
    def findable(self) -> list[BlockIdentity]:
        """Identities that a cached prefix may cover."""
        return self.identities[: self.num_skippable // HASH_BLOCK_TOKENS]

    @property
    def history(self) -> History | None:
        """Token ids for the sampler, if its parameters need them."""
        if not self.params.needs_history:
            return None
        return History(self.prompt_ids, tuple(self.tokens[len(self.prompt_ids) :]))

    def targets(self, start: int, end: int) -> tuple[int, ...]:
        """Prompt ids that the rows [start, end) predict, if their logprobs are wanted, else empty."""
        return () if self.scores is None else self.prompt_ids[start + 1 : end + 1]


def new_sequence(submit: Submit, arrival: int) -> Sequence:
    """Make the sequence of a `Submit`, in its first state."""
    num_prompt = len(submit.prompt_ids)
    wants_scores = submit.params.prompt_logprobs is not None and submit.num_emitted == 0
    return Sequence(
        key=submit.key,
        source=submit.source,
        params=submit.params,
        tokens=list(submit.prompt_ids),
        num_prompt=num_prompt,
        num_emitted=submit.num_emitted,
        identities=list(submit.identities[: num_prompt // HASH_BLOCK_TOKENS]),
        identity_root=submit.identity_root,
        deadline_s=submit.deadline_s,
        rank=(-submit.priority, arrival),
        prompt_ids=submit.prompt_ids[: num_prompt - submit.num_emitted],
        scores=[] if wants_scores else None,
        adapter_slot=submit.adapter_slot,
        state=SequenceState.QUEUED if submit.source is Source.FOR_PEER else SequenceState.WAITING,
    )
