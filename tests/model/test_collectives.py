"""Sums and joined columns over ranks by torch.distributed, against their definition."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.distributed import HashStore

from twostroke.checkpoint.shards import Shard
from twostroke.core.errors import RankLost
from twostroke.model.parallel.collectives import ONE_RANK, ordered_sum
from twostroke.model.parallel.torch_collectives import TorchCollectives, join_gloo


def on_ranks(size: int, call: Callable[[TorchCollectives], object], timeout_s: float = 120) -> list[object]:
    """Result of each rank, in a thread of its own; an error is a result too."""
    store = HashStore()

    def rank(number: int) -> object:
        try:
            return call(join_gloo(store, Shard(number, size), timeout_s))
        except RankLost as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(rank, range(size)))


def parts(size: int, rows: int, dtype: torch.dtype) -> torch.Tensor:
    numbers = torch.randn((size, rows, 24), generator=torch.Generator().manual_seed(size)) * 100
    return numbers.to(dtype)


def test_the_sum_is_in_rank_order_and_rounded_once() -> None:
    for order, wanted in (([2.0**24, 1.0, 1.0, -(2.0**24)], 0.0), ([2.0**24, -(2.0**24), 1.0, 1.0], 2.0)):
        numbers = torch.tensor(order).view(4, 1, 1)
        assert ordered_sum(numbers, torch.empty(1, 1)).item() == wanted
    thirds = torch.tensor([256.0, 1.0, 1.0], dtype=torch.bfloat16).view(3, 1)
    assert ordered_sum(thirds, thirds[0].clone()).item() == 258.0  # rounded after each addition it would be 256
    assert ordered_sum(torch.tensor([[2**24], [1]], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)) == 2**24 + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32])
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("rows", [1, 15, 64])
def test_gloo_gives_every_rank_the_bits_of_the_definition(dtype: torch.dtype, size: int, rows: int) -> None:
    given = parts(size, rows, dtype)
    wanted = ordered_sum(given, torch.empty_like(given[0]))

    def reduced(ranks: TorchCollectives) -> tuple[torch.Tensor, bool]:
        x = given[ranks.rank].clone()
        result = ranks.all_reduce(x)
        return result, result is x

    for result, is_in_place in on_ranks(size, reduced):
        assert torch.equal(result, wanted)
        assert is_in_place
    for one_row in on_ranks(size, lambda ranks: ranks.all_reduce(given[ranks.rank, -1:].clone())):
        assert torch.equal(one_row, wanted[-1:])  # whatever else is in the step


def test_gloo_joins_columns_without_padding() -> None:
    given = parts(3, 5, torch.float32)
    for joined in on_ranks(3, lambda ranks: ranks.all_gather(given[ranks.rank], 67)):
        assert torch.equal(joined, torch.cat(list(given), dim=1)[:, :67])
        assert joined.is_contiguous()
    for _ in range(3):  # on a busy machine gloo's own connections fail now and then
        empty = on_ranks(2, lambda ranks: ranks.all_gather(torch.empty(0, 24), 40))
        if not any(isinstance(none, RankLost) for none in empty):
            break
    assert [none.shape for none in empty] == [(0, 40)] * 2


def test_a_rank_that_leaves_is_lost_to_the_others() -> None:
    def leave(ranks: TorchCollectives) -> object:
        return ranks.all_reduce(torch.ones(4)) if ranks.rank == 0 else None

    lost, _ = on_ranks(2, leave)
    assert isinstance(lost, RankLost)


def test_a_rank_that_does_not_come_is_lost() -> None:
    with pytest.raises(RankLost):
        join_gloo(HashStore(), Shard(0, 2), timeout_s=0.2)


def test_one_rank_changes_nothing() -> None:
    x = torch.ones(2, 3)
    assert ONE_RANK.all_reduce(x) is x
    assert ONE_RANK.all_gather(x, 3) is x
