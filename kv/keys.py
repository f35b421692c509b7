"""Keys derived from a cluster's shared secret, equal in every process, and identities of prompts under them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ..core.request import CacheScope
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


def journal_key(cluster_key: str) -> bytes:
    """32 bytes that encrypt journaled requests in a store (router/journal/sealed.py)."""
    return hashlib.blake2b(cluster_key.encode(), digest_size=32, person=b"twostroke-journ").digest()


def supervisor_key(cluster_key: str) -> str:
    """API key with which a cluster's supervisor asks its routers; another supervisor of the cluster has the same."""
    return hashlib.blake2b(cluster_key.encode(), digest_size=32, person=b"twostroke-superv").hexdigest()


@dataclass(frozen=True, slots=True)
class PromptNames:
    """Root of a prompt's chain, and identities of its full hash blocks."""

    root: bytes
    identities: tuple[BlockIdentity, ...]


class HashedModel(Protocol):
    """A model as prompts are named by it: a worker's own facts, or what a worker told the router."""

    @property
    def weights_fingerprint(self) -> bytes:
        """16 bytes that stand for all weights."""
        ...

    @property
    def numerics_class(self) -> bytes:
        """16 bytes that stand for everything that can change a bit of a logit."""
        ...

    @property
    def deterministic(self) -> bool:
        """True if only KV of the same numerics class may be used."""
        ...

    @property
    def fell_back_from(self) -> str:
        """Codec that the worker's guard found too coarse; empty: none."""
        ...


NEVER_ROUNDED = b"never rounded"
"""Class of workers that have fallen back to bfloat16. KV that another codec rounded is of no use to them."""


def identity_class(model: HashedModel) -> bytes:
    """The part of a model's numerics that its block identities contain: workers that differ in it share no KV."""
    if model.deterministic:
        return model.numerics_class
    return NEVER_ROUNDED if model.fell_back_from else b""


@dataclass(frozen=True, slots=True)
class PromptHasher:
    """Hashes prompts of one model in one numerics class. Routers and workers make theirs with `of`, so they agree."""

    key: bytes  # identity_key
    weights_fingerprint: bytes
    numerics_class: bytes  # empty unless deterministic

    @classmethod
    def of(cls, key: bytes, model: HashedModel) -> PromptHasher:
        """The hasher of a model under a cluster's `identity_key`."""
        return cls(key, model.weights_fingerprint, identity_class(model))

    def root(self, scope: CacheScope) -> bytes:
        """The link before the first block of a scope's prompts."""
        return IdentityRoot(scope, self.weights_fingerprint, self.numerics_class).digest(self.key)

    def name(self, prompt_ids: Sequence[int], scope: CacheScope) -> PromptNames:
        """Root and identities of a prompt."""
        root = self.root(scope)
        return PromptNames(root, tuple(chain(self.key, root, prompt_ids)))
