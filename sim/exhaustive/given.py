"""What every search is given: the prompt, its tokens, and frames with the KV of this dispatch or of an older one."""

from __future__ import annotations

import numpy as np

from ...core.request import CacheScope, Epoch, SamplingParams
from ...engine.facts import FaceFacts
from ...kv.handover.frames import FrameLabel, encode_frame
from ...kv.handover.machine import Label
from ...kv.keys import PromptHasher
from ...kv.recent_prompts import NamedPrompt, RecentPrompts
from ...kv.section import SectionData
from ..invariants import Violation
from ..workers.cells import CELL_BYTES, DIGEST_KEY, SPEC, digest_of
from ..workers.engine import IDENTITY_KEY, NUMERICS
from ..workers.facts import MODEL_FACTS

PROMPT_TOKENS, UNIT_TOKENS = 24, 16  # two hash blocks, the second one partial: two frames
TOKENS = (5, 6)  # of every answer; a prefill worker samples the first
FRAME_SLOTS = 1
EPOCH, OLDER = Epoch(1, 2), Epoch(1, 1)  # of a hand-over, and of the strays on its stream
DOMAIN = "acme"
TIMEOUT_S = 1_000.0
CELLS, STALE_CELLS = 1_000, 9_000  # KV of a token is this plus its position


PARAMS = SamplingParams(max_tokens=len(TOKENS), temperature=0.0, ignore_eos=True)
SCOPE = CacheScope(DOMAIN, b"")
FACTS = FaceFacts(
    worker_id="w",
    model=MODEL_FACTS,
    namer=PromptHasher.of(IDENTITY_KEY, MODEL_FACTS),
    digest_key=DIGEST_KEY,
    num_blocks=3,
    block_tokens=UNIT_TOKENS,
    frame_bytes=UNIT_TOKENS * SPEC.bytes_per_token,
    frame_slots=FRAME_SLOTS,
    max_num_seqs=8,
    max_batch_tokens=64,
)
PROMPT_IDS = tuple(range(1, PROMPT_TOKENS + 1))
PROMPTS: list[NamedPrompt] = [
    RecentPrompts(FACTS.namer).name("r", PROMPT_IDS + TOKENS[:resumed], SCOPE) for resumed in range(len(TOKENS))
]


def sections_of(start: int, count: int, first_cell: int) -> tuple[SectionData, ...]:
    """Planes and seals of tokens [start, +count)."""
    cells = [first_cell + token for token in range(start, start + count)]
    planes = np.array(cells, np.uint64).view(np.uint8).reshape(1, 1, -1, CELL_BYTES)
    units = range(start // UNIT_TOKENS, -(-(start + count) // UNIT_TOKENS))
    parts = [cells[place * UNIT_TOKENS : (place + 1) * UNIT_TOKENS] for place in range(len(units))]
    seals = [digest_of(part, unit) for part, unit in zip(parts, units, strict=True)]
    return (
        SectionData("main", "k", 0, 1, 0, 1, 3, CELL_BYTES, planes, None, np.array(seals, np.uint64).reshape(1, 1, -1)),
    )


def older_frame(sequence: int, start: int, count: int) -> bytes:
    """A frame of an older dispatch, with that dispatch's KV and matching seals."""
    label = FrameLabel(Label("r", 0, OLDER), sequence, NUMERICS, start, count)
    return encode_frame(label, sections_of(start, count, STALE_CELLS), is_last=False)


def check_content(start: int, count: int, sections: tuple[SectionData, ...]) -> None:
    """Check that sections hold this dispatch's KV of tokens [start, +count).

    Raises:
        Violation: K4, they hold another's.
    """
    (section,) = sections
    cells = np.frombuffer(section.payload.tobytes(), np.uint64).tolist()
    if cells != [CELLS + token for token in range(start, start + count)]:
        raise Violation("K4", f"tokens {start}+{count} are stored, and they are not this dispatch's KV")
