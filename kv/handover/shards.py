"""Plan of a hand-over between caches that are split differently: slices of layers and heads between ranks. Pure.

    prefill TP 2, decode TP 4, 4 heads   rank 0: heads 0, 1 ─┬─ head 0 ─▶ rank 0     a slice goes from one rank to all
                                                             └─ head 1 ─▶ rank 1     ranks that store these heads
    MLA, prefill TP 2, decode TP 1       rank 0: half of the layers ─┬─▶ rank 0      holders of the same heads send
                                         rank 1: the other half ─────╯               equal shares of the layers

Every layer of every head is in exactly one slice, so no byte is sent twice. A side whose ranks share one endpoint is
planned as one rank that holds the whole model (`KvSpec` itself).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ...core.errors import PairRefused
from ..spec import Component, KvSpec


@dataclass(frozen=True, slots=True)
class Slice:
    """Layers and heads of one component on their way from one rank to one or several."""

    component: str
    layers: range
    heads: range  # counted in the whole model
    source: int  # rank that reads and sends it
    destinations: tuple[int, ...]  # all ranks that store it; the first one receives it and shares it in its node

    @property
    def receiver(self) -> int:
        """The rank that receives it from the source."""
        return self.destinations[0]


def rank_specs(spec: KvSpec, size: int) -> tuple[KvSpec, ...]:
    """Specs of the ranks of a worker with `size` ranks. `spec`: of the whole model.

    Raises:
        PairRefused: the heads of a component cannot be split over so many ranks.
    """
    for component in spec.main.components:
        heads = component.heads
        if component.shard == "split" and heads % size and size % heads:
            raise PairRefused(
                f"{heads} heads of {component.name} cannot be split over {size} ranks; one must be a multiple of the "
                "other",
                param="tensor_parallel_size",
            )
    return tuple(spec.of_rank(rank, size) for rank in range(size))


def plan_slices(source: Sequence[KvSpec], destination: Sequence[KvSpec]) -> tuple[Slice, ...]:
    """Slices that fill all ranks of `destination` from those of `source`, in the order of component, heads, layers.

    Codecs are not compared: a store translates what it can read (`pairing.py` decides which codecs pair).

    Raises:
        PairRefused: layers, components, widths or heads differ.
    """
    check_alike(source[0], destination[0])
    loads = _Loads([0] * len(source), [0] * len(destination))
    found: list[Slice] = []
    for place, component in enumerate(source[0].main.components):
        givers = [spec.main.components[place] for spec in source]
        takers = [_named(spec, component.name) for spec in destination]
        if _heads_of(givers) != _heads_of(takers):
            raise PairRefused(
                f"the source has heads {_heads_of(givers)} of {component.name}, the destination {_heads_of(takers)}",
                param="kv_spec",
            )
        for heads in _intervals([*givers, *takers]):
            found += _shared_out(component, heads, source[0].main.num_layers, (givers, takers), loads)
    return tuple(found)


def check_alike(ours: KvSpec, theirs: KvSpec) -> None:
    """Check that two specs have the same layers, and components of the same widths, whatever their heads and codecs.

    Raises:
        PairRefused: they do not; the message names the difference.
    """
    if theirs.main.num_layers != ours.main.num_layers:
        raise PairRefused(f"kv_spec has {theirs.main.num_layers} layers, ours {ours.main.num_layers}", param="kv_spec")
    mine, other = ({c.name: c.width for c in spec.main.components} for spec in (ours, theirs))
    if mine != other:
        raise PairRefused(f"kv_spec has components of widths {other}, ours {mine}", param="kv_spec")


@dataclass(frozen=True, slots=True)
class _Loads:
    """Bytes per token that each rank sends and receives so far, so that holders of the same heads share equally."""

    sent: list[int]
    received: list[int]


def _shared_out(
    component: Component, heads: range, num_layers: int, sides: tuple[list[Component], list[Component]], loads: _Loads
) -> list[Slice]:
    """Slices of heads that have the same holders: layers in equal shares, for the senders and for the receivers."""
    givers, takers = (_holders(side, heads) for side in sides)
    row = len(heads) * component.row_bytes
    sources = _shares(givers, num_layers, row, loads.sent)
    receivers = _shares(takers, num_layers, row, loads.received)
    found, layer = [], 0
    for end in sorted({layers.stop for _, layers in (*sources, *receivers)}):
        (source,) = (rank for rank, layers in sources if layer in layers)
        (receiver,) = (rank for rank, layers in receivers if layer in layers)
        others = tuple(rank for rank in takers if rank != receiver)
        found.append(Slice(component.name, range(layer, end), heads, source, (receiver, *others)))
        layer = end
    return found


def _shares(ranks: Sequence[int], num_layers: int, row: int, loads: list[int]) -> list[tuple[int, range]]:
    """Neighbouring layers for each rank, so many that the ranks' loads, which grow, become as equal as possible."""
    counts = dict.fromkeys(ranks, 0)
    for _ in range(num_layers):
        least = min(ranks, key=lambda rank: loads[rank])
        counts[least] += 1
        loads[least] += row
    shares, first = [], 0
    for rank, count in counts.items():
        if count:
            shares.append((rank, range(first, first + count)))
            first += count
    return shares


def _heads(component: Component) -> range:
    return range(component.first_head, component.first_head + component.heads)


def _holders(ranks: Iterable[Component], heads: range) -> tuple[int, ...]:
    return tuple(rank for rank, component in enumerate(ranks) if heads.start in _heads(component))


def _intervals(ranks: Iterable[Component]) -> list[range]:
    """Heads of the model, cut wherever the heads of some rank begin or end."""
    edges = sorted({edge for component in ranks for edge in (_heads(component).start, _heads(component).stop)})
    return [range(start, stop) for start, stop in pairwise(edges)]


def _heads_of(ranks: Iterable[Component]) -> str:
    """All heads that some rank holds, as text."""
    held = sorted({head for component in ranks for head in _heads(component)})
    gaps = [head for before, head in pairwise(held) if head != before + 1]
    return f"{held[0]} to {held[-1]}" + (f" without those before {gaps}" if gaps else "")


def _named(spec: KvSpec, name: str) -> Component:
    return next(component for component in spec.main.components if component.name == name)
