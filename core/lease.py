"""Lease times: how often each side shows that it lives, and the silence after which it counts as lost.

    router ◀── announcement ─── worker    WORKER_LEASE     the worker beats; silent: it is forgotten
    router ◀───── session ────▶ worker    WORKER_LEASE     the worker beats; silent: its requests go elsewhere
                                          SUSPECT_AFTER_S  and before that it gets no new requests
                                          ROUTER_LEASE     the router beats; silent: its requests end
    decode ◀──── hand-over ───▶ prefill   HANDOVER_LEASE   both beat; silent: decode computes the prompt
      face ◀────── link ─────── engine    ENGINE_LEASE     the engine beats; silent with work: health is bad

Every pair that watches each other takes both numbers from one `Lease`, so an interval and the timeout over it cannot
drift apart. A lost TCP connection is noticed at once; leases are for peers that hang, freeze, or vanish without a word.
"""

from __future__ import annotations

from dataclasses import dataclass

from .errors import ConfigError

MIN_BEATS = 2.0  # beats that fit into the silence: one may be late


@dataclass(frozen=True, slots=True)
class Lease:
    """A sign of life every `beat_s` seconds; a peer that gave none for `silence_s` seconds is lost."""

    beat_s: float = 0.5
    silence_s: float = 2.0

    def __post_init__(self) -> None:
        """Check the two numbers.

        Raises:
            ConfigError: they are not positive, or one late beat would lose the peer.
        """
        if self.beat_s <= 0 or self.silence_s < MIN_BEATS * self.beat_s:
            raise ConfigError(
                f"a lease of {self.silence_s} s of silence with a beat every {self.beat_s} s; the silence must be at"
                f" least {MIN_BEATS:g} beats, e.g. {max(MIN_BEATS * self.beat_s, 0.1):g} s"
            )


WORKER_LEASE = Lease(beat_s=0.2, silence_s=2.0)
ROUTER_LEASE = Lease(beat_s=0.5, silence_s=5.0)  # longer: a router that pauses must not cost all requests of a worker
HANDOVER_LEASE = Lease(beat_s=0.5, silence_s=2.0)
ENGINE_LEASE = Lease(beat_s=0.1, silence_s=2.0)

SUSPECT_AFTER_S = 0.75
"""Silence after which a worker gets no new requests: three beats. It costs nothing if the worker was only late."""

ORPHAN_GRACE_S = 5.0
"""Time that the requests of a lost router run on, so that it or another one can take them up again."""
