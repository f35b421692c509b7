"""Digests of API keys, as configurations hold them instead of the keys. Knows no configuration.

A key that `twostroke keys new` makes has 256 random bits, so that its SHA-256 cannot be reversed by trial, and a slow
hash would add nothing.
"""

from __future__ import annotations

import hashlib
import re

DIGEST_PREFIX = "sha256:"
_DIGEST = re.compile(f"{DIGEST_PREFIX}[0-9a-f]{{64}}")


def digest_of(key: str) -> bytes:
    """SHA-256 of a key, 32 bytes; of a configured digest ("sha256:" and 64 hex digits) the digest itself."""
    if is_digest(key):
        return bytes.fromhex(key.removeprefix(DIGEST_PREFIX))
    return hashlib.sha256(key.encode(errors="replace")).digest()


def is_digest(key: str) -> bool:
    """True if a configured key is a digest. A client that presents one has no key."""
    return key.startswith(DIGEST_PREFIX)


def check_digest(key: str) -> str:
    """Check the form of a digest; returns it.

    Raises:
        ValueError: it is malformed. The message does not show it: it may be a key by mistake.
    """
    if not _DIGEST.fullmatch(key):
        raise ValueError("must be sha256: and 64 hex digits, as `twostroke keys new NAME` prints them")
    return key


def line_for(key: str) -> str:
    """The digest of a key for the configuration."""
    return DIGEST_PREFIX + digest_of(key).hex()
