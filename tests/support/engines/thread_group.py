"""A tensor-parallel group whose ranks are threads of one process, and a hand that drives one decoder per rank."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from support.checkpoints.models import Hand, poison

from twostroke.checkpoint.config import KernelsChoice
from twostroke.checkpoint.config_json import load_spec
from twostroke.checkpoint.shards import Shard, shard_spec
from twostroke.checkpoint.spec import DType, Quantization
from twostroke.core.errors import RankLost
from twostroke.kv.store.store import KvStore
from twostroke.model.decoder.decoder import Decoder
from twostroke.model.loader import make_ops, torch_dtype
from twostroke.model.parallel.collectives import ONE_RANK, Collectives, ordered_sum
from twostroke.model.weights.rank_source import cut_source
from twostroke.model.weights.tensors import open_source
from twostroke.model.weights.weights import load_weights

T = TypeVar("T")
TIMEOUT_S = 120


class ThreadGroup:
    """Ranks that meet at a barrier. A rank that fails breaks it, so that the others fail too."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._barrier = threading.Barrier(size, timeout=TIMEOUT_S)
        self._given: list[torch.Tensor | None] = [None] * size
        self._pool = ThreadPoolExecutor(size)

    def ends(self) -> list[Collectives]:
        return [_End(self, rank) for rank in range(self.size)] if self.size > 1 else [ONE_RANK]

    def run(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        """Call one function per rank, each in a thread of its own."""
        futures = [self._pool.submit(self._guarded, call) for call in calls]
        errors = [error for error in (future.exception() for future in futures) if error is not None]
        if errors:
            self._barrier.reset()
            raise next((error for error in errors if not isinstance(error, RankLost)), errors[0])
        return [future.result() for future in futures]

    def _guarded(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except BaseException:
            self._barrier.abort()
            raise

    def exchange(self, rank: int, x: torch.Tensor) -> torch.Tensor:
        """All ranks' x, [ranks, ...]."""
        try:
            self._given[rank] = x
            self._barrier.wait()
            parts = torch.stack([part for part in self._given if part is not None])
            self._barrier.wait()
        except threading.BrokenBarrierError:
            raise RankLost("another thread failed") from None
        return parts


class _End:
    def __init__(self, group: ThreadGroup, rank: int) -> None:
        self._group = group
        self.rank = rank
        self.size = group.size

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        assert x.is_contiguous()
        return ordered_sum(self._group.exchange(self.rank, x), x)

    def all_gather(self, x: torch.Tensor, width: int) -> torch.Tensor:
        return torch.cat(list(self._group.exchange(self.rank, x)), dim=1)[:, :width].contiguous()


@dataclass
class Ranks:
    """One hand per rank; every call must give all ranks the same bits."""

    group: ThreadGroup
    hands: list[Hand]

    def logits(self, work: Sequence[tuple[str, int, Sequence[int]]]) -> list[torch.Tensor]:
        """`Hand.logits` of rank 0."""
        first, *others = self.group.run([lambda hand=hand: hand.logits(work) for hand in self.hands])
        for other in others:
            for mine, theirs in zip(first, other, strict=True):
                assert torch.equal(mine.view(torch.int32), theirs.view(torch.int32))
        return first


def make_ranks(
    path: Path,
    size: int,
    dtype: DType = "float32",
    kv: str = "float32",
    *,
    kernels: KernelsChoice = "torch",
    quantization: Quantization = "none",
    max_model_len: int | None = None,
    group: ThreadGroup | None = None,
) -> Ranks:
    """Hands of all ranks over a checkpoint, with poisoned stores."""
    spec, group = load_spec(path), group or ThreadGroup(size)
    hands = []
    for end in group.ends():
        rank = shard_spec(spec, Shard(end.rank, end.size))
        ops = make_ops(torch_dtype(dtype), quantization, kernels=kernels)
        weights = load_weights(cut_source(open_source(path), rank), rank.local, ops)
        ops.prepare()
        store = KvStore(rank.kv_spec(kv), 257, 16, digest_key=99)
        poison(store)
        hands.append(
            Hand(rank.local, Decoder(rank.local, weights, ops, max_model_len or spec.max_model_len, end), store)
        )
    return Ranks(group, hands)
