"""Proofs that both ends of a call inside the cluster know the cluster's key. Pure: time and nonces are arguments.

The caller's metadata has the claim (audience, time, nonce) and an HMAC-SHA256 over claim, method and direction. The
callee answers with the HMAC of the same claim in the other direction, which only the key's holders can make.

A proof authenticates caller and callee. It does not encrypt, and the messages after the proof have no HMAC. Against an
attacker who reads or changes packets only certificates help.
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
"""Largest difference between the clocks of two machines, and lifetime of a proof. Kerberos uses the same 5 minutes."""
MAX_NONCES = 1 << 17  # more than 200 calls per second for twice the window, in which a proof can be replayed

_VERSION = 1
_HEAD = struct.Struct(">BQ16s32s")  # version, time, nonce, HMAC; then the audience
_MAX_AUDIENCE_BYTES = 300  # a host name has 253 characters at most


class Direction(StrEnum):
    """Direction of a proof: a proof of one direction is invalid in the other."""

    CALL = "call"
    ANSWER = "answer"


@dataclass(frozen=True, slots=True)
class Claim:
    """Call that a proof is about."""

    method: str  # "/package.Service/Method"
    audience: str  # host:port that the caller used as the target
    sent_ms: int  # the caller's wall clock, milliseconds since 1970
    nonce: bytes  # NONCE_BYTES, unique to this call


class Fault(StrEnum):
    """Reason for which a proof is refused."""

    MISSING = "missing"
    MALFORMED = "malformed"
    KEY = "key"
    AUDIENCE = "audience"
    CLOCK = "clock"
    REPLAY = "replay"
    ROLE = "role"  # of the caller's certificate


class ProofRefused(Exception):
    """A call must not be served. The message is for the caller's log and contains no secret."""

    def __init__(self, fault: Fault, message: str) -> None:
        super().__init__(message)
        self.fault = fault


def sign(key: bytes, claim: Claim, direction: Direction) -> bytes:
    """HMAC-SHA256 (RFC 2104; 32 bytes) over direction and claim. The length of each text precedes it."""
    mac = hmac.new(key, digestmod=hashlib.sha256)
    for text in (direction.value, claim.method, claim.audience):
        data = text.encode()
        mac.update(len(data).to_bytes(4, "big") + data)
    mac.update(claim.sent_ms.to_bytes(8, "big") + claim.nonce)
    return mac.digest()


def call_header(key: bytes, claim: Claim) -> bytes:
    """Value of CALL_HEADER for a claim."""
    proof = sign(key, claim, Direction.CALL)
    return _HEAD.pack(_VERSION, claim.sent_ms, claim.nonce, proof) + claim.audience.encode()


def is_answer_to(claim: Claim, key: bytes, header: bytes | None) -> bool:
    """Return whether a value of ANSWER_HEADER was made with the key, for exactly this call."""
    return header is not None and hmac.compare_digest(sign(key, claim, Direction.ANSWER), header)


class Verifier:
    """Verifier of the proofs that one server gets. State: key, own address, and seen nonces.

    Each proof is accepted once. Nonces are kept as long as their proofs could be accepted. When there are too many, the
    oldest are forgotten and all proofs up to their age are refused, so that no proof is accepted twice. A proof older
    than the verifier is refused too: an earlier life of the server may have seen its nonce.
    """

    def __init__(self, key: bytes, now_ms: int, max_nonces: int = MAX_NONCES) -> None:
        self.audience: str | None = None  # host:port by which callers know this server; None: by any name
        self._key = key
        self._max_nonces = max_nonces
        self._seen: set[bytes] = set()
        self._by_age: list[tuple[int, bytes]] = []  # heap of (sent_ms, nonce)
        self._oldest_ms = now_ms

    def check(self, method: str, header: bytes | None, now_ms: int) -> bytes:
        """Check a call's proof. Returns the value of ANSWER_HEADER for it.

        Raises:
            ProofRefused: the proof is missing, malformed, wrong, too old, replayed, or meant for another server.
        """
        if header is None:
            raise ProofRefused(Fault.MISSING, f"the call has no proof of the cluster's key; {_REMEDY}")
        claim, proof = _parsed(method, header)
        if not hmac.compare_digest(sign(self._key, claim, Direction.CALL), proof):
            raise ProofRefused(
                Fault.KEY, f"the cluster's key differs; {_REMEDY}, and start a cluster without one again with it"
            )
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
            self._oldest_ms = 0  # our clock was set back, so `_oldest_ms` is meaningless
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
