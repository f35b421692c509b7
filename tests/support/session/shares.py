"""The order of tests for several test processes: long modules at the front of each process's share.

With `worksteal`, pytest-xdist gives every process a contiguous share of the list, and one that is done takes from the
end of the longest share left. A module whose cluster takes half a minute to start would be taken apart so, and start it
in every process.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def dealt(
    items: Sequence[Item], num_shares: int, module_of: Callable[[Item], str], is_long: Callable[[str], object]
) -> list[Item]:
    """`items` in `num_shares` contiguous shares whose fronts are whole long modules, each otherwise in the given order.

    Sizes are xdist's: it sends `remaining // shares left` to one process after the other.
    """
    fronts: list[list[Item]] = [[] for _ in range(num_shares)]
    rest: list[Item] = []
    modules: dict[str, list[Item]] = {}
    for item in items:
        module = module_of(item)
        (modules.setdefault(module, []) if is_long(module) else rest).append(item)
    for number, module_items in enumerate(modules.values()):
        fronts[number % num_shares].extend(module_items)
    order: list[Item] = []
    for number, front in enumerate(fronts):
        size = (len(items) - len(order)) // (num_shares - number)
        taken = max(0, size - len(front))
        order += front + rest[:taken]
        del rest[:taken]
    return order + rest
