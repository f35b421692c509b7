"""All layers in one call give the bits of op by op, for every family that they serve; the others go op by op."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.checkpoints.tiny_families import FAMILIES, VOCAB

NAMES = [family.name for family in FAMILIES]
OP_BY_OP = ("mixtral", "moe", "deepseek", "gpt-oss", "next", "3.5")  # parts of the names of those without a stack


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gives_the_bits_of_op_by_op(
    name: str, dtype: str, family_directory: Callable[[str], Path], make_hand: Callable
) -> None:
    served_len = next(family.served_len for family in FAMILIES if family.name == name)
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(VOCAB, (n,), generator=generator).tolist() for n in (70, 1, 33)]
    answers = []
    for by_stack in (True, False):
        hand = make_hand(family_directory(name), dtype, "fp8", kernels="native", max_model_len=served_len)
        assert (hand.decoder._stack is None) == any(kind in name for kind in OP_BY_OP), name
        if not by_stack:
            hand.decoder._stack = None
        first = hand.logits([(str(i), 0, text) for i, text in enumerate(ids)])
        second = hand.logits([("0", 70, [5]), ("1", 1, [6, 7]), ("2", 33, [8])])
        answers.append(
            (first + second, [part.clone() for c in hand.store.components for part in (c.payload, c.scales)])
        )
    for got, wanted in zip(answers[0][0], answers[1][0], strict=True):
        assert torch.equal(got, wanted)
    for got, wanted in zip(answers[0][1], answers[1][1], strict=True):
        assert torch.equal(got, wanted)  # the cache too


@pytest.mark.parametrize("name", [name for name in NAMES if name in ("llama-biases", "qwen3", "gemma2", "phi3")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("read_rows", [(69, 70, 103), (0, 5, 68), (70,), ()], ids=str)
def test_rows_that_nobody_reads_change_neither_the_others_nor_the_cache(
    name: str, dtype: str, read_rows: tuple[int, ...], family_directory: Callable[[str], Path], make_hand: Callable
) -> None:
    served_len = next(family.served_len for family in FAMILIES if family.name == name)
    generator = torch.Generator().manual_seed(4)
    work = [(str(i), 0, torch.randint(VOCAB, (n,), generator=generator).tolist()) for i, n in enumerate((70, 1, 33))]
    answers = []
    for rows in (None, read_rows):
        hand = make_hand(family_directory(name), dtype, "fp8", kernels="native", max_model_len=served_len)
        logits = torch.cat(hand.logits(work, rows))
        answers.append((logits, [part.clone() for c in hand.store.components for part in (c.payload, c.scales)]))
    (whole, cache), (some, other_cache) = answers
    assert torch.equal(some[list(read_rows)], whole[list(read_rows)])
    assert len(read_rows) < 3 or not torch.equal(some, whole)  # the others really were left out
    for got, wanted in zip(other_cache, cache, strict=True):
        assert torch.equal(got, wanted)
