"""Proofs that both ends of a call inside the cluster know its key. Pure: time and nonces are handed in.

The caller's metadata has the claim (who is called, when, a nonce) and an HMAC-SHA256 over claim, method and direction.
The callee answers with the HMAC of the same claim in the other direction, which only the key's holders can make.

What a proof guards: who calls, and who answers. What it does not guard: nothing on the wire is encrypted, and the
messages after the proof have no HMAC. Against somebody who reads or changes packets only certificates help.
"""

from __future__ import annotations

import hashlib
import heapq
import hmac
import struct
from dataclasses import dataclass
from enum import StrEnum

CALL_HEADER = "twostroke-proof-bin"
ANSWER_HEADER = "twostroke-answer-bin"

NONCE_BYTES = 16
WINDOW_MS = 300_000
"""How far the clocks of two machines may differ, and how long a proof is of use. Kerberos has the same five minutes."""
MAX_NONCES = 1 << 17  # 200 calls per second for all the time in which their proofs could come again

_VERSION = 1
_HEAD = struct.Struct(">BQ16s32s")  # version, time, nonce, HMAC; then the audience
_MAX_AUDIENCE_BYTES = 300  # a host name has 253 characters at most


class Direction(StrEnum):
    """Whose proof it is: one direction's proof is of no use in the other."""

    CALL = "call"
    ANSWER = "answer"


@dataclass(frozen=True, slots=True)
class Claim:
    """What a proof is about: one call."""

    method: str  # "/package.Service/Method"
    audience: str  # host:port that the caller dialled
    sent_ms: int  # the caller's wall clock, since 1970
    nonce: bytes  # NONCE_BYTES that no other call has


class Fault(StrEnum):
    """Why a proof is refused."""

    MISSING = "missing"
    MALFORMED = "malformed"
    KEY = "key"
    AUDIENCE = "audience"
    CLOCK = "clock"
    REPLAY = "replay"


class ProofRefused(Exception):
    """The call may not be served. The message is for the caller's log; it tells no secret."""

    def __init__(self, fault: Fault, message: str) -> None:
        super().__init__(message)
        self.fault = fault


def sign(key: bytes, claim: Claim, direction: Direction) -> bytes:
    """32 bytes: HMAC-SHA256 (RFC 2104) over direction and claim. Every text is preceded by its length."""
    mac = hmac.new(key, digestmod=hashlib.sha256)
    for text in (direction.value, claim.method, claim.audience):
        data = text.encode()
        mac.update(len(data).to_bytes(4, "big") + data)
    mac.update(claim.sent_ms.to_bytes(8, "big") + claim.nonce)
    return mac.digest()


def call_header(key: bytes, claim: Claim) -> bytes:
    """The value of CALL_HEADER."""
    proof = sign(key, claim, Direction.CALL)
    return _HEAD.pack(_VERSION, claim.sent_ms, claim.nonce, proof) + claim.audience.encode()


def is_answer_to(claim: Claim, key: bytes, header: bytes | None) -> bool:
    """Whether this value of ANSWER_HEADER was made by somebody who knows the key, for this very call."""
    return header is not None and hmac.compare_digest(sign(key, claim, Direction.ANSWER), header)


class Verifier:
    """What one server knows of proofs: its key, its own address, and the nonces that it has seen.

    Each proof counts once. Nonces are remembered while their proofs would pass for new; when there are too many, the
    oldest are forgotten and whatever is as old as they are is refused, so that a forgotten proof never passes again.
    A proof that is older than the verifier is refused too: an earlier life of the server may have seen its nonce.
    """

    def __init__(self, key: bytes, now_ms: int, max_nonces: int = MAX_NONCES) -> None:
        self.audience: str | None = None  # host:port by which callers know this server; None: by any name
        self._key = key
        self._max_nonces = max_nonces
        self._seen: set[bytes] = set()
        self._by_age: list[tuple[int, bytes]] = []  # heap of (sent_ms, nonce)
        self._oldest_ms = now_ms

    def check(self, method: str, header: bytes | None, now_ms: int) -> bytes:
        """Check a call's proof; the value of ANSWER_HEADER for it.

        Raises:
            ProofRefused: the caller did not prove that it knows the key, or that this call is new and meant for us.
        """
        if header is None:
            raise ProofRefused(Fault.MISSING, f"the call has no proof of the cluster's key; {_REMEDY}")
        claim, proof = _parsed(method, header)
        if not hmac.compare_digest(sign(self._key, claim, Direction.CALL), proof):
            raise ProofRefused(Fault.KEY, f"the cluster's key differs; {_REMEDY}")
        if self.audience is not None and claim.audience != self.audience:
            raise ProofRefused(Fault.AUDIENCE, f"the call is meant for {claim.audience}, and this is {self.audience}")
        self._check_age(claim, now_ms)
        self._remember(claim, now_ms)
        return sign(self._key, claim, Direction.ANSWER)

    def _check_age(self, claim: Claim, now_ms: int) -> None:
        ahead_ms = claim.sent_ms - now_ms
        if abs(ahead_ms) > WINDOW_MS:
            raise ProofRefused(
                Fault.CLOCK,
                f"the caller's clock is {abs(ahead_ms) / 1000:.0f} s {'ahead of' if ahead_ms > 0 else 'behind'} ours; "
                f"at most {WINDOW_MS // 1000} s are tolerated: set the clocks by NTP",
            )
        if now_ms < self._oldest_ms:
            self._oldest_ms = 0  # our clock was set back: age says nothing until then
        if claim.sent_ms < self._oldest_ms:
            raise ProofRefused(Fault.REPLAY, "the proof is older than what this server remembers; call again")
        if claim.nonce in self._seen:
            raise ProofRefused(Fault.REPLAY, "the proof was used before; each call makes its own")

    def _remember(self, claim: Claim, now_ms: int) -> None:
        while self._by_age and self._by_age[0][0] < now_ms - WINDOW_MS:
            self._seen.discard(heapq.heappop(self._by_age)[1])
        if len(self._by_age) >= self._max_nonces:
            sent_ms, nonce = heapq.heappop(self._by_age)
            self._seen.discard(nonce)
            self._oldest_ms = max(self._oldest_ms, sent_ms + 1)
        self._seen.add(claim.nonce)
        heapq.heappush(self._by_age, (claim.sent_ms, claim.nonce))


_REMEDY = "set TWOSTROKE__CLUSTER__KEY to the same secret for all processes of the cluster"


def _parsed(method: str, header: bytes) -> tuple[Claim, bytes]:
    if not _HEAD.size < len(header) <= _HEAD.size + _MAX_AUDIENCE_BYTES:
        raise ProofRefused(Fault.MALFORMED, f"a proof of {len(header)} bytes; this release makes others")
    version, sent_ms, nonce, proof = _HEAD.unpack_from(header)
    try:
        audience = header[_HEAD.size :].decode()
    except UnicodeDecodeError:
        raise ProofRefused(Fault.MALFORMED, "a proof whose address is no text") from None
    if version != _VERSION:
        raise ProofRefused(Fault.MALFORMED, f"a proof of version {version}; this release knows {_VERSION}")
    return Claim(method, audience, sent_ms, nonce), proof
