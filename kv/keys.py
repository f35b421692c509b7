"""Keys derived from a cluster's shared secret, equal in every process, and identities of prompts under them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from .block import BlockIdentity, IdentityRoot, chain


def identity_key(cluster_key: str) -> bytes:
    """32 bytes that key block identities (kv/block.py)."""
    return hashlib.blake2b(cluster_key.encode(), digest_size=32, person=b"twostroke-ident").digest()


def digest_key(cluster_key: str) -> int:
    """64 bits that key KV digests (kv/digest.py)."""
    raw = hashlib.blake2b(cluster_key.encode(), digest_size=8, person=b"twostroke-digest").digest()
    return int.from_bytes(raw, "little")


def proof_key(cluster_key: str) -> bytes:
    """32 bytes that key the proofs of calls inside the cluster (core/proof.py)."""
    return hashlib.blake2b(cluster_key.encode(), digest_size=32, person=b"twostroke-proof").digest()


@dataclass(frozen=True, slots=True)
class PromptNames:
    """Root of a prompt's chain, and identities of its full hash blocks."""

    root: bytes
    identities: tuple[BlockIdentity, ...]


@dataclass(frozen=True, slots=True)
class PromptHasher:
    """Hashes prompts of one model in one numerics class. Equal hashers give equal identities in all processes."""

    key: bytes  # identity_key
    weights_fingerprint: bytes
    numerics_class: bytes  # empty unless deterministic

    def root(self, isolation_domain: str, adapter: bytes = b"") -> bytes:
        """The link before the first block of all prompts of a domain and adapter."""
        return IdentityRoot(isolation_domain, self.weights_fingerprint, self.numerics_class, adapter).digest(self.key)

    def name(self, prompt_ids: Sequence[int], isolation_domain: str, adapter: bytes = b"") -> PromptNames:
        """Root and identities of a prompt."""
        root = self.root(isolation_domain, adapter)
        return PromptNames(root, tuple(chain(self.key, root, prompt_ids)))
