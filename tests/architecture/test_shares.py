"""Long modules stand whole at the front of a share, so that no second process starts their cluster."""

from itertools import groupby

import pytest
from support.session.shares import dealt

ITEMS = [
    f"{module}/{number}"
    for module, size in (("a", 50), ("long1", 9), ("b", 33), ("long2", 7))
    for number in range(size)
]
ITEMS += [f"long{number}/0" for number in range(3, 8)]


def module_of(item: str) -> str:
    return item.split("/", maxsplit=1)[0]


def is_long(module: str) -> bool:
    return module.startswith("long")


@pytest.mark.parametrize("num_shares", [1, 2, 3, 4, 7])
def test_a_long_module_stands_whole_at_the_front_of_a_share(num_shares: int) -> None:
    order = dealt(ITEMS, num_shares, module_of, is_long)
    assert sorted(order) == sorted(ITEMS)
    done = 0
    for number in range(num_shares):
        size = (len(order) - done) // (num_shares - number)
        share = order[done : done + size]
        kinds = [kind for kind, _ in groupby(is_long(module_of(item)) for item in share)]
        assert kinds in ([True, False], [True]), "long modules first, then the others"
        done += size
    runs = [module for module, _ in groupby(map(module_of, order))]
    assert all(runs.count(module) == 1 for module in runs if is_long(module)), "and none of them taken apart"


def test_the_others_keep_their_order() -> None:
    order = dealt(ITEMS, 4, module_of, is_long)
    assert [item for item in order if not is_long(module_of(item))] == [
        item for item in ITEMS if not is_long(module_of(item))
    ]


def test_long_modules_of_more_tests_than_a_share_lose_nothing() -> None:
    items = [f"long/{number}" for number in range(10)] + ["a/0", "b/0"]
    assert sorted(dealt(items, 4, module_of, is_long)) == sorted(items)
