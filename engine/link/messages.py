"""EngineLink: the interface between a worker's face and its engine. Two bounded queues of plain values.

    face (asyncio: gRPC, KV bytes, digests, text)  ── Command ──▶  engine (step loop: scheduler, pool, runner)
                                                   ◀── Event ───

Commands and events are frozen values without callbacks or shared objects, so that the pair can be two threads (small
machines) or two processes (GPUs). KV planes travel in them by value; between threads they may view memory of the face.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING

from ...core.request import FinishReason, Role, SamplingParams, SequenceKey, TokenLogprobs
from ...core.tally import Spread
from ...kv.block import BlockIdentity

if TYPE_CHECKING:
    from ...kv.section import PlaneBuffer, SectionData

LOCAL = {"is_local": True}
"""Metadata of a field that does not leave the process: between processes it keeps its default. It is the last one."""

# ------------------------------------------------------------------ face to engine


class Source(Enum):
    """Origin of a sequence's prompt KV, and its use after the prefill."""

    LOCAL = auto()  # computed here, decoded here
    PEER = auto()  # computed by a prefill worker, decoded here
    FOR_PEER = auto()  # computed here for a decode worker; the first token is sampled, then the blocks are held


@dataclass(frozen=True, slots=True)
class Submit:
    """Start a new sequence. Answered by `Promised`/`Offered`, or by `Ended` with an error."""

    key: SequenceKey
    source: Source
    prompt_ids: tuple[int, ...]
    identities: tuple[BlockIdentity, ...]  # of the prompt's full hash blocks
    identity_root: bytes  # to continue the chain over generated tokens
    params: SamplingParams
    num_emitted: int = 0  # trailing prompt ids that the client has already (re-dispatch): they count as generated
    priority: int = 0
    deadline_s: float | None = None  # of the engine's clock
    adapter_slot: int = 0  # of the adapter that all its tokens are computed with; 0: none


@dataclass(frozen=True, slots=True)
class CancelSequence:
    """Free a sequence at the next step boundary. Answered by `Ended` unless it had ended already."""

    key: SequenceKey
    reason: FinishReason = FinishReason.CANCELLED  # STOP: the face found a stop string; ERROR: it failed there


@dataclass(frozen=True, slots=True)
class Bind:
    """PEER: bind physical blocks for the whole prompt now. Answered by `Bound`; or `NotYet`, and `Bound` later."""

    key: SequenceKey


@dataclass(frozen=True, slots=True)
class WriteKv:
    """PEER: verified planes of tokens [token_start, +token_count). Answered by `KvWritten`."""

    key: SequenceKey
    token_start: int
    token_count: int
    sections: tuple[SectionData, ...]


@dataclass(frozen=True, slots=True)
class KvComplete:
    """PEER: the prompt's KV is complete and its first token known: decode from here on."""

    key: SequenceKey
    first_token: int


@dataclass(frozen=True, slots=True)
class PrefillLocally:
    """PEER: the peer was lost or refused; keep the first `kept_tokens` and compute the rest here."""

    key: SequenceKey
    kept_tokens: int
    first_token: int | None  # if known already (and perhaps sent): it is not sampled and not emitted again


@dataclass(frozen=True, slots=True)
class PeerBound:
    """FOR_PEER: decode has bound its blocks; the sequence may be computed."""

    key: SequenceKey


@dataclass(frozen=True, slots=True)
class PeerNotYet:
    """FOR_PEER: decode has no room now; park the sequence (`PeerBound` will come) and take another."""

    key: SequenceKey


@dataclass(frozen=True, slots=True)
class ReadKv:
    """Read the planes of a sequence's tokens. Answered by `KvRead`."""

    key: SequenceKey
    token_start: int
    token_count: int
    without_windows: bool = False  # of the full layers only (kv/windows.py)
    into: PlaneBuffer | None = field(default=None, metadata=LOCAL)  # memory for the planes, of this process


class Reading(Enum):
    """What is read of cached hash blocks."""

    ALL = auto()  # up to the first block without its windowed layers
    WITHOUT_WINDOWS = auto()  # of the full layers only
    NOTHING = auto()  # only counted, up to the last one after which computing may begin


@dataclass(frozen=True, slots=True)
class FetchBlocks:
    """Read cached hash blocks by identity (Blocks.Fetch). Answered by `BlocksFetched`."""

    fetch_id: int
    identities: tuple[BlockIdentity, ...]
    first_token: int
    root: bytes  # of their chain: blocks of other chains are not returned
    how: Reading = Reading.ALL


@dataclass(frozen=True, slots=True)
class Release:
    """Give the blocks back; they stay cached. Answered by `Ended`.

    FOR_PEER: decode has verified the whole prompt. PEER, bound: nothing more comes, and nothing is decoded; what was
    written without a gap stays.
    """

    key: SequenceKey


@dataclass(frozen=True, slots=True)
class AskSnapshot:
    """Ask for all held identities. Answered by `CacheSnapshot`."""


@dataclass(frozen=True, slots=True)
class SetRole:
    """Change the role from the next step on; live sequences continue."""

    role: Role


@dataclass(frozen=True, slots=True)
class LoadAdapter:
    """Load an adapter beside the steps. Answered by `AdapterLoaded` or `AdapterRefused`."""

    slot: int  # above 0, never used before
    directory: str
    digest: bytes  # of what the files must hold


@dataclass(frozen=True, slots=True)
class DropAdapter:
    """Forget the adapter of a slot, which no live sequence has."""

    slot: int


@dataclass(frozen=True, slots=True)
class Stop:
    """End the step loop; every sequence ends as cancelled."""


AdapterCommand = LoadAdapter | DropAdapter
"""They concern the runner alone; the core does not see them."""

CoreCommand = (
    Submit
    | CancelSequence
    | Bind
    | WriteKv
    | KvComplete
    | PrefillLocally
    | PeerBound
    | PeerNotYet
    | ReadKv
    | FetchBlocks
    | Release
    | AskSnapshot
    | SetRole
    | Stop
)
Command = CoreCommand | AdapterCommand

# ------------------------------------------------------------------ engine to face


@dataclass(frozen=True, slots=True)
class Promised:
    """PEER, LOCAL: room is promised. `held_tokens` leading tokens are cached here (PEER: ask the peer for the rest)."""

    key: SequenceKey
    held_tokens: int


@dataclass(frozen=True, slots=True)
class Offered:
    """FOR_PEER: next to run; ask decode to bind. `cached_tokens` leading tokens are cached here."""

    key: SequenceKey
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Bound:
    """PEER: blocks for the whole prompt are bound."""

    key: SequenceKey


@dataclass(frozen=True, slots=True)
class NotYet:
    """PEER: there is no room now; `Bound` follows when there is."""

    key: SequenceKey


@dataclass(frozen=True, slots=True)
class KvWritten:
    """PEER: these tokens are in the store."""

    key: SequenceKey
    token_start: int
    token_count: int


@dataclass(frozen=True, slots=True)
class Progress:
    """FOR_PEER: KV of the first `num_computed` tokens is computed and sealed."""

    key: SequenceKey
    num_computed: int
    began: bool = False  # this is the first report for the sequence
    began_s: float | None = field(default=None, compare=False)  # planning time of its first step, of the engine's clock


@dataclass(frozen=True, slots=True)
class TokenNews:
    """New tokens of one sequence in one step."""

    key: SequenceKey
    first_index: int  # among the generated tokens, emitted ones of an earlier dispatch included
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()  # of each, if asked for
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()  # if asked for, with the first: of the prompt from its second on
    began_s: float | None = field(default=None, compare=False)  # FOR_PEER, as in `Progress`, which follows


@dataclass(frozen=True, slots=True)
class StepTokens:
    """All tokens that one step sampled."""

    step: int
    news: tuple[TokenNews, ...]


@dataclass(frozen=True, slots=True)
class KvRead:
    """Planes and sealed digests of a sequence's tokens; None if they cannot be read, e.g. after its end."""

    key: SequenceKey
    token_start: int
    token_count: int
    sections: tuple[SectionData, ...] | None


@dataclass(frozen=True, slots=True)
class BlocksFetched:
    """The longest leading part of the requested blocks that is held here."""

    fetch_id: int
    num_blocks: int
    sections: tuple[SectionData, ...]


@dataclass(frozen=True, slots=True)
class Ended:
    """A sequence is over and owns no blocks. Exactly once per `Submit`."""

    key: SequenceKey
    reason: FinishReason
    error_code: str = ""  # with FinishReason.ERROR: a code of core/errors.py
    error_message: str = ""
    cached_tokens: int = 0  # prompt tokens found in this worker's own cache
    preemptions: int = 0
    draft_tokens: int = 0  # guessed here (engine/speculation/)
    accepted_tokens: int = 0  # those of them that were right
    proposer: str = ""  # what guessed them; empty: nothing
    began_s: float | None = field(default=None, compare=False)  # planning time of its first step, of the engine's clock


@dataclass(frozen=True, slots=True)
class CacheDelta:
    """Hash blocks that became findable (stored) or are no longer findable (removed).

    `sequence` grows by one per delta; after a gap the receiver needs a snapshot.
    """

    sequence: int
    stored: tuple[BlockIdentity, ...]  # one that is stored already has got or lost its windowed layers
    removed: tuple[BlockIdentity, ...]
    lacking: tuple[BlockIdentity, ...] = ()  # of the stored: ends of blocks without their windowed layers


@dataclass(frozen=True, slots=True)
class CacheSnapshot:
    """All held identities, parents first, as of delta number `sequence`."""

    sequence: int
    identities: tuple[BlockIdentity, ...]
    lacking: tuple[BlockIdentity, ...] = ()  # of these: ends of blocks without their windowed layers


@dataclass(frozen=True, slots=True)
class LoadNews:
    """Beat of the engine, at 10 Hz and after every step while sequences wait: load, phase, measured coefficients."""

    phase: str
    steps: int
    waiting: int
    running: int
    queued_prefill_tokens: int
    running_context_tokens: int
    free_blocks: int
    cached_blocks: int
    promised_blocks: int
    total_blocks: int
    prefill_ms_per_token: float
    prefill_ms_per_token_pair: float
    decode_step_ms: float
    counters: tuple[tuple[str, int], ...]
    waiting_for_peer: int = 0  # sequences that wait for the other worker of a hand-over
    waiting_for_room: int = 0  # sequences that wait for blocks or seats here
    queued_prefill_pairs: float = 0.0  # (query, key) pairs of `queued_prefill_tokens`
    spreads: tuple[tuple[str, Spread], ...] = ()  # histograms by name, since the start: core/metrics.py


@dataclass(frozen=True, slots=True)
class AdapterLoaded:
    """The adapter of a slot is in memory: sequences may have it from now on."""

    slot: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class AdapterRefused:
    """The adapter of a slot could not be loaded."""

    slot: int
    code: str  # of core/errors.py
    message: str


Event = (
    Promised
    | Offered
    | Bound
    | NotYet
    | KvWritten
    | Progress
    | StepTokens
    | KvRead
    | BlocksFetched
    | Ended
    | CacheDelta
    | CacheSnapshot
    | LoadNews
    | AdapterLoaded
    | AdapterRefused
)
