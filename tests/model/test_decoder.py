"""Logits against transformers: whole, batched, chunked and behind a cached prefix."""

from pathlib import Path

import pytest
import torch
from support.checkpoints.logits_oracle import assert_same_logits, oracle

LLAMA3 = (
    ("rope_type", "llama3"),
    ("rope_theta", 500000.0),
    ("factor", 8.0),
    ("low_freq_factor", 1.0),
    ("high_freq_factor", 4.0),
    ("original_max_position_embeddings", 64),
)
LINEAR = (("rope_type", "linear"), ("rope_theta", 10000.0), ("factor", 2.0))
SHAPES = [
    {"heads": 4, "kv_heads": 4, "head_dim": 32, "tied": False, "rope": LINEAR},
    {"heads": 4, "kv_heads": 2, "head_dim": 64, "tied": True},
    {"heads": 4, "kv_heads": 1, "head_dim": 32, "hidden": 80, "tied": False, "rope": LLAMA3, "shard_size": "60KB"},
]


def prompts(vocab: int, lengths: tuple[int, ...]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(vocab, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("shape", SHAPES, ids=["mha-linear", "gqa2-default", "mqa4-llama3-sharded"])
def test_agrees_with_transformers(shape: dict, write_tiny, make_hand) -> None:
    directory = write_tiny(shape)
    expected = oracle(directory)
    hand = make_hand(directory, block_tokens=32)
    one, seventeen, long = prompts(hand.spec.vocab_size, (1, 17, 560))
    batched = hand.logits([("a", 0, one), ("b", 0, seventeen), ("c", 0, long)])
    for ids, ours in zip((one, seventeen, long), batched, strict=True):
        assert_same_logits(ours, expected(ids))
    chunked = [
        hand.logits([("d", start, long[start:end])])[0]
        for start, end in ((0, 3), (3, 255), (255, 257), (257, 258), (258, 560))
    ]
    assert_same_logits(torch.cat(chunked), expected(long))
    hand.share("e", "c", 544)
    assert_same_logits(hand.logits([("e", 544, long[544:])])[0], expected(long)[544:])


def test_agrees_with_transformers_on_the_bundled_model(make_hand) -> None:
    directory = Path(__file__).parents[2] / "model" / "bundled"
    if not (directory / "model.safetensors").exists():
        pytest.skip("no bundled model in this tree yet")
    expected = oracle(directory)
    hand = make_hand(directory)
    short, long = prompts(hand.spec.vocab_size, (40, 700))
    for ids, ours in zip((short, long), hand.logits([("a", 0, short), ("b", 0, long)]), strict=True):
        assert_same_logits(ours, expected(ids))
