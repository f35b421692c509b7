"""All layers of several ranks in one native call each, with the sums inside: the logits of one rank."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support.checkpoints.logits_oracle import assert_same_logits
from support.checkpoints.tiny_families import FAMILIES
from support.engines.thread_group import ThreadGroup, make_ranks

from twostroke.kernels.cpu.build import NativeUnavailable, built_library
from twostroke.model.parallel.collectives import Collectives
from twostroke.model.parallel.shared_group import SharedMemoryGroup, shared_region

SERVED_LEN = {family.name: family.served_len for family in FAMILIES}
SMALL = 4096  # bytes of a slot: sums of more than a few rows take several turns
LARGE = 1 << 20


class SharedThreads(ThreadGroup):
    """Threads that meet in shared memory."""

    def __init__(self, size: int, slot_bytes: int) -> None:
        super().__init__(size)
        region = shared_region(size, slot_bytes)
        self.groups = [SharedMemoryGroup(region, rank, size, slot_bytes) for rank in range(size)]
        os.close(region)

    def ends(self) -> list[Collectives]:
        return list(self.groups)


@pytest.fixture
def make_group() -> Iterator[Callable[..., SharedThreads]]:
    try:
        built_library()
    except NativeUnavailable as error:
        pytest.skip(str(error))
    made: list[SharedThreads] = []

    def make(size: int, slot_bytes: int = SMALL) -> SharedThreads:
        made.append(SharedThreads(size, slot_bytes))
        return made[-1]

    yield make
    for each in made:
        for group in each.groups:
            group.close()


def work() -> list[tuple[str, int, list[int]]]:
    generator = torch.Generator().manual_seed(8)
    return [(str(i), 0, torch.randint(157, (n,), generator=generator).tolist()) for i, n in enumerate((70, 1, 33))]


@pytest.mark.parametrize("slot_bytes", [SMALL, LARGE])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", ["llama-biases", "gemma2", "phi3", "qwen3", "qwen3-moe", "deepseek-v2", "gpt-oss"])
def test_ranks_agree_with_one(
    name: str, size: int, slot_bytes: int, family_directory: Callable[[str], Path], make_group: Callable
) -> None:
    options = {"kernels": "native", "max_model_len": SERVED_LEN[name]}
    alone = make_ranks(family_directory(name), 1, **options)
    split = make_ranks(family_directory(name), size, group=make_group(size, slot_bytes), **options)
    for mine, theirs in zip(split.hands, alone.hands * size, strict=True):
        assert mine.decoder.is_fused == theirs.decoder.is_fused
    whole = split.logits(work())
    for rows, wanted in zip(whole, alone.logits(work()), strict=True):
        assert_same_logits(rows, wanted)
    ids = work()[0][2]
    parts = [split.logits([("chunked", a, ids[a:b])])[0] for a, b in ((0, 5), (5, 48), (48, 70))]
    assert torch.equal(torch.cat(parts), whole[0])  # the bits depend on the text alone


@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize("name", ["llama-biases", "gemma2"])
def test_sums_are_rounded_once(
    name: str, quantization: str, family_directory: Callable[[str], Path], make_group: Callable
) -> None:
    directory, (text, *_) = family_directory(name), work()
    (exact,) = make_ranks(directory, 1).logits([text])
    errors = []
    for group in (None, make_group(2)):
        size = 1 if group is None else 2
        made = make_ranks(directory, size, "bfloat16", "fp8", kernels="native", quantization=quantization, group=group)
        assert made.hands[0].decoder.is_fused
        (rows,) = made.logits([text])
        errors.append(1 - torch.nn.functional.cosine_similarity(rows, exact).quantile(0.1).item())
    assert max(errors) < 0.02
    assert errors[1] < 1.5 * errors[0] + 1e-4


def test_a_group_that_fails_ends_the_call_with_its_error(
    family_directory: Callable[[str], Path], make_group: Callable
) -> None:
    group = make_group(2)
    ranks = make_ranks(family_directory("qwen3"), 2, kernels="native", group=group)
    ranks.logits(work())
    group.groups[0].fail(1)
    for hand in ranks.hands:
        with pytest.raises(Exception, match="rank 1 of 2 is gone"):
            hand.logits([("x", 0, [1, 2, 3])])


def test_rows_that_are_not_read_change_nothing_over_ranks(
    family_directory: Callable[[str], Path], make_group: Callable
) -> None:
    ranks = make_ranks(family_directory("qwen3"), 2, kernels="native", group=make_group(2))
    read = (69, 70, 103)
    whole = torch.cat(ranks.group.run([lambda hand=hand: torch.cat(hand.logits(work())) for hand in ranks.hands])[:1])
    some = ranks.group.run([lambda hand=hand: torch.cat(hand.logits(work(), read)) for hand in ranks.hands])
    assert torch.equal(some[0][list(read)], whole[list(read)])
    assert torch.equal(some[0][list(read)], some[1][list(read)])
