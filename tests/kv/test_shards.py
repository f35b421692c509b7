"""Plans between caches that are split differently, over all pairs of sizes."""

import itertools
from collections import Counter

import pytest

from twostroke.core.errors import PairRefused
from twostroke.kv.handover.shards import Slice, plan_slices, rank_specs
from twostroke.kv.spec import Component, KvSpec, LayerGroup, attention_spec, mla_spec

SIZES = (1, 2, 4, 8)
LAYERS = 3


def splits(heads: int, size: int) -> bool:
    return not heads % size or not size % heads


def both(component: Component) -> range:
    return range(component.first_head, component.first_head + component.heads)


def check(source: tuple[KvSpec, ...], destination: tuple[KvSpec, ...]) -> tuple[Slice, ...]:
    """Everything that a plan promises."""
    plan = plan_slices(source, destination)
    specs = {c.name: c for c in source[0].main.components}
    places = {c.name: place for place, c in enumerate(source[0].main.components)}
    layers = source[0].main.num_layers
    filled: Counter[tuple[int, str, int, int]] = Counter()
    sent: Counter[int] = Counter()
    received: Counter[int] = Counter()
    for piece in plan:
        assert piece.layers
        assert piece.heads
        holder = source[piece.source].main.components[places[piece.component]]
        assert set(piece.heads) <= set(both(holder)), "a source sends only what it holds"
        assert len(set(piece.destinations)) == len(piece.destinations)
        size = len(piece.layers) * len(piece.heads) * specs[piece.component].row_bytes
        sent[piece.source] += size
        received[piece.receiver] += size
        for rank, layer, head in itertools.product(piece.destinations, piece.layers, piece.heads):
            filled[rank, piece.component, layer, head] += 1
    wanted = {
        (rank, c.name, layer, head)
        for rank, spec in enumerate(destination)
        for c in spec.main.components
        for layer in range(layers)
        for head in both(c)
    }
    assert set(filled) == wanted, "every head of every rank is filled, and nothing else"
    assert set(filled.values()) == {1}, "once"
    whole = sum(
        layers * c.row_bytes * len({head for spec in source for head in both(spec.main.components[place])})
        for place, c in enumerate(source[0].main.components)
    )
    assert sum(sent.values()) == whole, "each head is sent once, however many hold it on either side"
    for side, loads in ((source, sent), (destination, received)):
        for ranks in _replicas(side):
            row = max(c.row_bytes * c.heads for c in side[0].main.components)
            shares = [loads[rank] for rank in ranks]
            assert max(shares) - min(shares) <= row, "holders of the same heads share the work"
    return plan


def _replicas(side: tuple[KvSpec, ...]) -> list[list[int]]:
    by_heads: dict[tuple[range, ...], list[int]] = {}
    for rank, spec in enumerate(side):
        by_heads.setdefault(tuple(both(c) for c in spec.main.components), []).append(rank)
    return list(by_heads.values())


@pytest.mark.parametrize("heads", range(1, 17))
@pytest.mark.parametrize("layers", [1, 2, 3, 8, 13])
def test_every_pair_of_sizes_fills_every_head_once_from_a_holder(heads: int, layers: int) -> None:
    spec = attention_spec(layers, heads, 16, 1)
    for one, other in itertools.product(SIZES, SIZES):
        if splits(heads, one) and splits(heads, other):
            check(rank_specs(spec, one), rank_specs(spec, other))
        else:
            with pytest.raises(PairRefused, match=f"{heads} heads of k cannot be split over"):
                plan_slices(rank_specs(spec, one), rank_specs(spec, other))


@pytest.mark.parametrize("layers", [1, 2, 5, 16])
def test_a_latent_is_sent_once_and_shared_by_its_holders(layers: int) -> None:
    spec = mla_spec(layers, 512, 64, 2)
    for one, other in itertools.product(SIZES, SIZES):
        plan = check(rank_specs(spec, one), rank_specs(spec, other))
        assert all(len(piece.destinations) == other for piece in plan)
        assert layers < max(one, other) or {piece.source for piece in plan} == set(range(one))


def test_components_with_unlike_heads_and_replication_are_planned_apart() -> None:
    def spec(codec: int) -> KvSpec:
        parts = (Component("k", 2, 16, codec), Component("v", 8, 32, codec), Component("latent", 1, 64, 2, "replicate"))
        return KvSpec((LayerGroup("main", 4, parts),))

    for one, other in itertools.product(SIZES, SIZES):
        check(rank_specs(spec(1), one), rank_specs(spec(3), other))


def test_a_plan_of_two_ranks_to_four_reads_as_drawn() -> None:
    spec = attention_spec(2, 4, 16, 1)
    plan = plan_slices(rank_specs(spec, 2), rank_specs(spec, 4))
    keys = [(p.heads, p.source, p.destinations) for p in plan if p.component == "k"]
    assert keys == [
        (range(0, 1), 0, (0,)),
        (range(1, 2), 0, (1,)),
        (range(2, 3), 1, (2,)),
        (range(3, 4), 1, (3,)),
    ]
    back = plan_slices(rank_specs(spec, 4), rank_specs(spec, 2))
    assert [(p.heads.start, p.source, p.destinations) for p in back if p.component == "v"] == [
        (0, 0, (0,)),
        (1, 1, (0,)),
        (2, 2, (1,)),
        (3, 3, (1,)),
    ]


def test_replicas_on_both_sides_share_in_unlike_numbers() -> None:
    plan = plan_slices(*(rank_specs(attention_spec(4, 2, 16, 1), size) for size in (4, 8)))
    first = [p for p in plan if p.component == "k" and p.heads == range(0, 1)]
    assert [(p.layers, p.source, p.receiver) for p in first] == [
        (range(0, 1), 0, 0),
        (range(1, 2), 0, 1),
        (range(2, 3), 1, 2),
        (range(3, 4), 1, 3),
    ]
    assert all(sorted(p.destinations) == [0, 1, 2, 3] for p in first)


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (attention_spec(3, 4, 16, 1), "3 layers, ours 2"),
        (attention_spec(2, 4, 32, 1), "widths"),
        (attention_spec(2, 8, 16, 1), "heads 0 to 3 of k, the destination 0 to 7"),
        (mla_spec(2, 16, 16, 1), "widths"),
    ],
)
def test_caches_that_hold_other_numbers_have_no_plan(other: KvSpec, told: str) -> None:
    with pytest.raises(PairRefused, match=told):
        plan_slices((attention_spec(2, 4, 16, 1),), (other,))
