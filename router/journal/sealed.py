"""Encryption of journaled values: AES-256-GCM under a key of the cluster, bound to the place where a value is stored.

A store sees neither names nor contents, and cannot change a value or move it to another request unnoticed.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

NONCE_BYTES = 12


class Sealer:
    """Seals and opens values; `key`: 32 bytes, kv.keys.journal_key."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._cipher = AESGCM(key)

    def place(self, tenant: str, request_id: str) -> str:
        """Name of a request in the store, which tells nothing about it."""
        name = f"{len(tenant)}:{tenant}{request_id}".encode()
        return hmac.new(self._key, name, hashlib.sha256).hexdigest()

    def seal(self, value: bytes, place: str) -> bytes:
        """Encrypt a value for a place."""
        nonce = secrets.token_bytes(NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, value, place.encode())

    def open(self, sealed: object, place: str) -> bytes | None:
        """The value that was sealed for this place; None: this is none."""
        if not isinstance(sealed, bytes) or len(sealed) <= NONCE_BYTES:
            return None
        try:
            return self._cipher.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], place.encode())
        except InvalidTag:
            return None
