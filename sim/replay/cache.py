"""The cache of one simulated worker: the production pool and prefix cache, whose blocks are those of a trace."""

from __future__ import annotations

from ...engine.policy import RolePolicy, Room
from ...kv.block import BlockIdentity
from ...kv.cache.pool import BlockPool
from ...kv.cache.prefix import PrefixCache
from ...kv.spec import HASH_BLOCK_TOKENS
from .job import Job


class JobCache:
    """Blocks of jobs. Pool and prefix cache count in hash blocks, each of which stands for a block of the trace."""

    def __init__(self, capacity_tokens: int, block_tokens: int, policy: RolePolicy) -> None:
        self.block_tokens = block_tokens
        self.pool = BlockPool(max(1, capacity_tokens // block_tokens), HASH_BLOCK_TOKENS)
        self.prefix = PrefixCache(self.pool)
        self._policy = policy

    def findable(self, job: Job) -> tuple[BlockIdentity, ...]:
        """Identities that a cached prefix may cover: never the last token, whose logits are wanted."""
        return job.identities[: (job.prompt_tokens - 1) // self.block_tokens]

    def held_tokens(self, job: Job) -> int:
        """Leading tokens of its prompt that are cached."""
        return self.prefix.match(self.findable(job)) * self.block_tokens

    def has_room(self, job: Job) -> bool:
        """True if its blocks may be taken, as `Scheduler._has_room` decides it."""
        pool = self.pool
        held = self.prefix.match(self.findable(job))
        live = 0
        for identity in job.identities[:held]:
            block = self.prefix.locate(identity)
            live += block is not None and pool.owners(block) > 0
        needed = self._blocks_for(job) - live
        if needed > pool.num_free:
            return False
        return pool.num_live == 0 or self._policy.has_room(Room(needed, pool.num_live, 0, pool.num_blocks))

    def take(self, job: Job) -> None:
        """Take its cached prefix and the blocks for its prompt and the first decode."""
        job.blocks = self.prefix.acquire(self.findable(job))
        job.num_computed = len(job.blocks) * self.block_tokens
        job.num_published = len(job.blocks)
        job.blocks += self.pool.take(self._blocks_for(job) - len(job.blocks))

    def publish(self, job: Job, num_computed: int) -> None:
        """Make the full blocks of its first `num_computed` tokens findable."""
        full = min(num_computed // self.block_tokens, len(job.identities))
        if full > job.num_published:
            job.blocks = self.prefix.publish(job.identities[:full], job.blocks, job.num_published)
            job.num_published = full

    def release(self, job: Job) -> None:
        """Give its blocks back; published ones stay findable until they are evicted."""
        self.pool.give_back(job.blocks)
        job.blocks, job.num_published = [], 0

    def _blocks_for(self, job: Job) -> int:
        return -(-(job.prompt_tokens + 1) // self.block_tokens)
