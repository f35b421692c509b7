"""Size of a block pool from the available memory, with its arithmetic as text. Knows numbers only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..core.errors import DoesNotFit
from .spec import KvSpec

MAX_POOL_BLOCKS = 1 << 20  # with more, the lists of free blocks take seconds to build and gigabytes of memory


@dataclass(frozen=True, slots=True)
class MemoryFacts:
    """Memory of one worker, in bytes."""

    memory_bytes: int  # this worker's share of the device or machine
    weight_bytes: int
    swap_bytes: int = 0  # for preempted sequences' blocks
    swaps_elsewhere: bool = False  # swap space and rings are in another memory than the pool: the host's, for a GPU
    ring_bytes: int = 0  # shared memory of hand-overs
    process_bytes: int = 0  # the interpreter and its libraries
    activation_bytes: int = 0  # intermediate values of the largest step
    state_bytes: int = 0  # recurrent states
    adapter_bytes: int = 0  # kept for adapters
    device_bytes: int | None = None  # of the whole device, of which others may have shares too; None: not known


@dataclass(frozen=True, slots=True)
class PoolSize:
    """Size of a pool that fits, and the arithmetic behind it."""

    num_blocks: int
    block_tokens: int
    pool_bytes: int
    arithmetic: str
    num_swap_blocks: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens the pool holds."""
        return self.num_blocks * self.block_tokens


def size_pool(spec: KvSpec, block_tokens: int, max_tokens: int | None, fraction: float, facts: MemoryFacts) -> PoolSize:
    """Size of the pool: `fraction` of the memory left after weights and swap space, at most `max_tokens`.

    In whole blocks, at most MAX_POOL_BLOCKS of them.

    Raises:
        DoesNotFit: no block fits, or none fits the swap space; the message has the arithmetic.
    """
    block_bytes = spec.bytes_per_token * block_tokens
    num_swap_blocks = facts.swap_bytes // (spec.main.bytes_per_token * block_tokens)  # a draft model's are not swapped
    if facts.swap_bytes and not num_swap_blocks:
        raise DoesNotFit(
            f"cache.swap_space is {facts.swap_bytes:,} bytes and one KV block takes {block_bytes:,}; "
            "give it more GiB, or 0 for none"
        )
    swap_bytes = 0 if facts.swaps_elsewhere else facts.swap_bytes
    ring_bytes = 0 if facts.swaps_elsewhere else facts.ring_bytes
    others = facts.process_bytes + facts.activation_bytes + swap_bytes + ring_bytes + facts.state_bytes
    others += facts.adapter_bytes
    left = facts.memory_bytes - facts.weight_bytes - others
    by_memory = int(max(0, left) * fraction) // block_bytes
    by_tokens = None if max_tokens is None else max_tokens // block_tokens
    num_blocks = min(by_memory, MAX_POOL_BLOCKS) if by_tokens is None else min(by_memory, by_tokens, MAX_POOL_BLOCKS)
    limit = "no token limit" if by_tokens is None else f"at most {max_tokens:,} tokens = {by_tokens:,} blocks"
    if num_blocks == MAX_POOL_BLOCKS < by_memory:
        limit += f", at most {MAX_POOL_BLOCKS:,} blocks in any pool"
    swap = f" − swap space {_mib(swap_bytes)}" if swap_bytes else ""
    rings = f" − hand-over rings {_mib(ring_bytes)}" if ring_bytes else ""
    process = f" − process {_mib(facts.process_bytes)}" if facts.process_bytes else ""
    steps = f" − activations {_mib(facts.activation_bytes)}" if facts.activation_bytes else ""
    states = f" − recurrent states {_mib(facts.state_bytes)}" if facts.state_bytes else ""
    adapters = f" − adapters {_mib(facts.adapter_bytes)}" if facts.adapter_bytes else ""
    taken = f"{process} − weights {_mib(facts.weight_bytes)}{adapters}{steps}{states}{swap}{rings}"
    arithmetic = (
        f"memory {_mib(facts.memory_bytes)}{taken} = {_mib(left)}; "
        f"× {fraction:g} ÷ ({spec.bytes_per_token:,} bytes/token × {block_tokens} tokens/block) "
        f"= {by_memory:,} blocks; "
        f"{limit}"
    )
    if num_blocks < 1:
        raise DoesNotFit(f"no KV block fits: {arithmetic}. {_remedy(facts, left, fraction, block_bytes)}")
    return PoolSize(num_blocks, block_tokens, num_blocks * block_bytes, arithmetic, num_swap_blocks)


def _remedy(facts: MemoryFacts, left: int, fraction: float, block_bytes: int) -> str:
    """What can help: nothing that takes memory from terms that are zero, no setting of the cache beside the weights."""
    is_gpu = facts.swaps_elsewhere
    ways = ["a smaller model" if is_gpu else "a smaller model or dtype"]
    if is_gpu:
        ways.append("a GPU with more memory")
    if facts.device_bytes is None or facts.memory_bytes < facts.device_bytes:
        ways.append("fewer workers on a GPU" if is_gpu else "fewer workers")
    if facts.memory_bytes <= facts.process_bytes + facts.weight_bytes:
        return f"The weights alone leave nothing, whatever the cache's settings: use {_either(ways)}"
    if fraction < 1 and left >= block_bytes:
        ways.append("a larger cache.memory_fraction")
    if facts.adapter_bytes:
        ways.append("less model.max_lora_bytes")
    if facts.activation_bytes:
        ways.append("less step.max_num_batched_tokens or step.max_num_seqs")
    if facts.swap_bytes and not is_gpu:
        ways.append("less cache.swap_space")
    if facts.ring_bytes and not is_gpu:
        ways.append("less cache.ring_bytes")
    if facts.state_bytes:
        ways.append("less step.max_num_seqs or cache.state_snapshots")
    return f"Use {_either(ways)}"


def _either(ways: Sequence[str]) -> str:
    *others, last = ways
    return f"{', '.join(others)} or {last}" if others else last


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.0f} MiB"
