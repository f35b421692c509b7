"""Names of blocks: physical ids, and identities chained over 16-token hash blocks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NewType

from ..core.request import CacheScope
from .spec import HASH_BLOCK_TOKENS

BlockId = NewType("BlockId", int)
"""Place of a physical block in one worker's pool."""

BlockIdentity = NewType("BlockIdentity", bytes)
"""16-byte hash of one prefix: its root and all tokens up to the end of a block."""

IDENTITY_BYTES = 16


@dataclass(frozen=True, slots=True)
class IdentityRoot:
    """All facts besides the tokens that two prefixes must have in common to share KV."""

    scope: CacheScope
    weights_fingerprint: bytes
    numerics_class: bytes  # set in deterministic mode, else empty

    def digest(self, key: bytes) -> bytes:
        """First link of the chain, 16 bytes; `key` is the identity key of the cluster, 1 to 64 bytes."""
        parts = (
            self.scope.isolation_domain.encode(),
            self.scope.adapter,
            self.weights_fingerprint,
            self.numerics_class,
        )
        hasher = hashlib.blake2b(key=key, digest_size=IDENTITY_BYTES, person=b"twostroke-root")
        for part in parts:
            hasher.update(len(part).to_bytes(4, "little") + part)
        return hasher.digest()


def chain(key: bytes, root: bytes, token_ids: Sequence[int], start: int = 0) -> list[BlockIdentity]:
    """Identities of the full hash blocks of `token_ids`; the partial tail has none.

    `root` is the link before the first token: `IdentityRoot.digest`, or the identity of the block that ends at
    `start` when `token_ids` continues a sequence. Source: prefix chaining as in vLLM's automatic prefix caching,
    with a keyed BLAKE2b-128, so that only the cluster's processes can compute or collide an identity.
    """
    identities: list[BlockIdentity] = []
    link = root
    blake2b = hashlib.blake2b
    for first in range(start, len(token_ids) - HASH_BLOCK_TOKENS + 1, HASH_BLOCK_TOKENS):
        data = b"".join([t.to_bytes(4, "little") for t in token_ids[first : first + HASH_BLOCK_TOKENS]])
        link = blake2b(link + data, key=key, digest_size=IDENTITY_BYTES).digest()
        identities.append(BlockIdentity(link))
    return identities
