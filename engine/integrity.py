"""Integrity checks of sequences against the blocks that they hold. Knows no state transitions and no step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from ..kv.block import BlockId
from .cache_manager import KvCacheManager
from .sequence import QUEUE_STATES, Sequence, SequenceState

_S = SequenceState


def check_holdings(holdings: KvCacheManager, sequences: Collection[Sequence], among: range | None = None) -> None:
    """Prove that sequences, pool, prefix cache and swap space agree.

    `sequences`: all live ones. `among`: numbers of the blocks to check, in the pool and in host memory; None: all.

    Raises:
        AssertionError: names the fault and the sequence or block.
    """
    for sequence in sequences:
        _check_sequence(sequence, holdings)
    if holdings.states is not None:
        holdings.states.check_integrity(sequences)
    if holdings.drafts is not None:
        holdings.drafts.check_integrity(sequences, among)
    pool, swap = holdings.pool, holdings.swap
    looked_at = _within(among, pool.num_blocks)
    claims = Counter(block for sequence in sequences for block in sequence.blocks if block in looked_at)
    for block in map(BlockId, looked_at):
        owners = pool.owners(block)
        assert owners == claims[block], f"block {block} counts {owners} owners, {claims[block]} sequences claim it"
    pool.check_integrity(among=looked_at)
    holdings.prefix.check_integrity(None if among is None else looked_at)
    if swap is not None:
        swap.check_integrity(sequences, _within(among, swap.pool.num_blocks))


def _within(among: range | None, num_blocks: int) -> range:
    return range(num_blocks) if among is None else range(min(among.start, num_blocks), min(among.stop, num_blocks))


def _check_sequence(sequence: Sequence, holdings: KvCacheManager) -> None:
    covered = len(sequence.blocks) * holdings.pool.block_tokens
    where = f"{sequence.key} ({sequence.state.name})"
    if sequence.state in QUEUE_STATES:
        assert not sequence.blocks, f"{where} waits and owns {sequence.blocks}"
    table, swapped = sequence.table, sequence.swapped
    assert table is None or table == holdings.table_of(sequence.blocks), f"{where} has a table of other blocks"
    assert (swapped is not None) == (sequence.state is _S.SWAPPED), f"{where} has host blocks {swapped}"
    if swapped is not None:
        assert sequence.num_computed == swapped.end, f"{where} computed {sequence.num_computed}, swapped {swapped.end}"
        return
    assert sequence.num_computed <= covered, f"{where} has {sequence.num_computed} computed in {covered}"
    num_drafts = 0 if sequence.drafting is None else sequence.drafting.num_under_way
    most = holdings.blocks_for(len(sequence.tokens) + max(num_drafts, 1))
    assert len(sequence.blocks) <= most, f"{where} owns {len(sequence.blocks)} blocks, its tokens fill {most}"
    if sequence.state in (_S.BOUND, _S.PREFILLING):
        assert covered >= sequence.num_prompt, f"{where} covers {covered} of {sequence.num_prompt}"
    if sequence.state is _S.DECODING:
        assert sequence.num_remaining == 1, f"{where} has {sequence.num_remaining} to compute"
    if sequence.state not in (_S.PROMISED, _S.OFFERED, _S.READY):
        assert sequence.num_promised == 0, f"{where} still counts {sequence.num_promised} promised"
