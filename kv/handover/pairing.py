"""Check of a prefill and a decode worker that would hand over to each other, from what both announce. Pure.

The router checks every pair before it chooses one, and the prefill worker checks the order of its peer again. Unlike
tensor parallelism, physical block sizes and codecs are no reason against a pair: the planes on the wire have the heads
of the whole model in the codec of the prefill worker, and the decode worker's store translates them. What was rounded
to one byte per number is not rounded to another such codec, because both errors would remain.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache
from typing import Protocol

from ...core.errors import PairRefused
from ..spec import CODEC_NAMES, KvSpec, is_rounded
from .machine import HANDOVER
from .shards import plan_slices, rank_specs

READS = "kv.read."
"""Prefix of the capabilities that name the codecs a worker can store; without any, those of the first release."""

CAPABILITIES = (HANDOVER, *(READS + name for name in CODEC_NAMES))
"""What a worker of this release says of its hand-overs."""

_FIRST_CODECS = frozenset(("fp8", "bfloat16", "float32"))
_NAME_BY_CODEC = {codec: name for name, codec in CODEC_NAMES.items()}


class HandoverSide(Protocol):
    """What one worker of a pair announces."""

    @property
    def numerics(self) -> bytes:
        """Fingerprint of the weights, and in deterministic mode everything else that can change a bit."""
        ...

    @property
    def capabilities(self) -> Collection[str]:
        """Names of what it can do; empty: it announced none."""
        ...

    @property
    def kv_spec(self) -> KvSpec | None:
        """Layout of the whole model's cache; None: not announced."""
        ...

    @property
    def num_ranks(self) -> int:
        """Tensor-parallel ranks."""
        ...


def why_refused(prefill: HandoverSide, decode: HandoverSide) -> PairRefused | None:
    """The reason why these two cannot hand over, not raised; None: they can.

    Its `param` names the field that differs: numerics_class, capabilities, kv_spec or tensor_parallel_size.
    """
    if prefill.numerics != decode.numerics:
        return PairRefused(
            "their weights differ, or in deterministic mode their numerics class (dtype, codec, kernels, machine, "
            "tensor parallelism); give both the same settings, or set model.deterministic to false",
            param="numerics_class",
        )
    mine, theirs = _protocols(prefill), _protocols(decode)
    if mine and theirs and mine.isdisjoint(theirs):
        return PairRefused(
            f"the prefill worker knows the hand-overs {_told(mine)}, the decode worker {_told(theirs)}; run releases "
            "that follow each other",
            param="capabilities",
        )
    if prefill.kv_spec is None or decode.kv_spec is None:
        return None
    unread = _codecs(prefill.kv_spec) - _readable(decode)
    if unread:
        return PairRefused(
            f"the decode worker cannot store {_told(unread)}, in which the prefill worker keeps KV; choose another "
            "cache.dtype (--kv-cache-dtype)",
            param="kv_spec",
        )
    twice = _rounded_twice(prefill.kv_spec, decode.kv_spec)
    if twice is not None:
        return PairRefused(
            f"the prefill worker keeps {twice}: rounded twice; give both one cache.dtype (--kv-cache-dtype), or one of "
            "them bfloat16",
            param="kv_spec",
        )
    if prefill.kv_spec == decode.kv_spec and prefill.num_ranks == decode.num_ranks:
        return None
    return _why_no_plan(prefill.kv_spec, prefill.num_ranks, decode.kv_spec, decode.num_ranks)


@lru_cache(maxsize=1024)
def _why_no_plan(source: KvSpec, source_ranks: int, destination: KvSpec, ranks: int) -> PairRefused | None:
    try:
        plan_slices(rank_specs(source, source_ranks), rank_specs(destination, ranks))
    except PairRefused as refused:
        return refused.with_traceback(None)
    return None


def _protocols(side: HandoverSide) -> frozenset[str]:
    return frozenset(name for name in side.capabilities if name.startswith("handover."))


def _readable(side: HandoverSide) -> frozenset[str]:
    said = frozenset(name.removeprefix(READS) for name in side.capabilities if name.startswith(READS))
    return said or _FIRST_CODECS


def _codecs(spec: KvSpec) -> frozenset[str]:
    return frozenset(_NAME_BY_CODEC[component.codec] for component in spec.main.components)


def _rounded_twice(source: KvSpec, destination: KvSpec) -> str | None:
    """The first component that would go from one rounded codec to another, in words."""
    theirs = {component.name: component.codec for component in destination.main.components}
    for component in source.main.components:
        found = theirs.get(component.name, component.codec)
        if found != component.codec and is_rounded(found) and is_rounded(component.codec):
            names = _NAME_BY_CODEC[component.codec], _NAME_BY_CODEC[found]
            return f"its {component.name} as {names[0]}, the decode worker as {names[1]}"
    return None


def _told(names: Collection[str]) -> str:
    return ", ".join(sorted(names))
