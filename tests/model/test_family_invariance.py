"""The same bits for the same prefix in every family, however a prompt is cut, batched and cached."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from support.checkpoints.tiny_families import FAMILIES, VOCAB

LENGTH = 300  # past a tile of 256 positions, and past every window
SHARED = 48
SERVED = {family.name: family.served_len for family in FAMILIES}
# One of each arithmetic; features that differ in weights alone need no second one.
CHOSEN = [
    "llama-biases",
    "llama-yarn",
    "mistral",
    "ministral",
    "qwen2-windows",
    "qwen3-windows",
    "gemma2",
    "gemma3",
    "phi3-longrope-short",
    "mixtral",
    "qwen2-moe-windows",
    "qwen3-moe",
    "deepseek-v2",
    "deepseek-v3",
    "gpt-oss",
    "qwen3-next",
    "qwen3.5",
    "qwen3.5-moe",
]


def prompt(seed: int, length: int) -> list[int]:
    shared, own = random.Random(0), random.Random(seed + 1)
    return [(shared if i < SHARED else own).randrange(VOCAB) for i in range(length)]


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.int32)


@pytest.fixture(scope="module")
def reference(family_directory: Callable[[str], Path], make_hand: Callable) -> Callable[..., torch.Tensor]:
    """Logits of a prompt in one piece, alone; longer ones answer for shorter."""
    known: dict[tuple[str, str, str, str, int], torch.Tensor] = {}

    def logits(name: str, kernels: str, dtype: str, kv: str, seed: int) -> torch.Tensor:
        key = (name, kernels, dtype, kv, seed)
        if key not in known:
            hand = make_hand(family_directory(name), dtype, kv, 16, 512, max_model_len=SERVED[name], kernels=kernels)
            (known[key],) = hand.logits([("only", 0, prompt(seed, LENGTH))])
        return known[key]

    return logits


@settings(
    max_examples=3,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],  # a failing schedule is small enough as it is
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
@pytest.mark.parametrize("kernels", ["torch", "native"])
@pytest.mark.parametrize("name", CHOSEN)
def test_bits_depend_on_a_tokens_own_prefix_alone(
    *,
    name: str,
    kernels: str,
    reference: Callable,
    family_directory: Callable[[str], Path],
    make_hand: Callable,
    data: st.DataObject,
) -> None:
    dtype, kv = data.draw(st.sampled_from([("bfloat16", "fp8"), ("float32", "fp8"), ("float32", "bfloat16")]))
    block_tokens = data.draw(st.sampled_from([16, 32, 64]))
    lengths = data.draw(st.lists(st.integers(1, LENGTH), min_size=2, max_size=4))
    chooser = data.draw(st.randoms(use_true_random=False))
    hand = make_hand(family_directory(name), dtype, kv, block_tokens, 4096, max_model_len=SERVED[name], kernels=kernels)
    shared, done = SHARED // block_tokens * block_tokens, [0] * len(lengths)
    hand.keep = (shared,)
    while any(done[i] < length for i, length in enumerate(lengths)):
        ready = [i for i, length in enumerate(lengths) if done[i] < length]
        chosen = chooser.sample(ready, chooser.randint(1, len(ready)))
        work = []
        for i in chosen:
            if done[i] == 0 and shared and lengths[i] > shared and done[0] > SHARED and chooser.random() < 0.7:
                hand.share(str(i), "0", shared)  # a cached prefix
                done[i] = shared
            count = min(lengths[i] - done[i], chooser.choice([1, 2, 7, 17, 64, 255, LENGTH]))
            work.append((str(i), done[i], prompt(i, lengths[i])[done[i] : done[i] + count]))
        for (_, start, ids), i, logits in zip(work, chosen, hand.logits(work), strict=True):
            expected = reference(name, kernels, dtype, kv, i)[start : start + len(ids)]
            assert torch.isfinite(logits).all()
            assert torch.equal(bits(logits), bits(expected))
            done[i] += len(ids)


@pytest.mark.parametrize("kernels", ["torch", "native"])
@pytest.mark.parametrize("name", ["gemma2", "qwen2-moe-windows", "deepseek-v3", "gpt-oss", "qwen3.5"])
def test_two_threads_give_the_bits_of_one(
    name: str, kernels: str, reference: Callable, family_directory: Callable[[str], Path], make_hand: Callable
) -> None:
    expected = reference(name, kernels, "float32", "fp8", 0)
    torch.set_num_threads(2)
    hand = make_hand(family_directory(name), "float32", "fp8", 16, 512, max_model_len=SERVED[name], kernels=kernels)
    (whole,) = hand.logits([("a", 0, prompt(0, LENGTH))])
    if hand.decoder.ops.num_threads != 2:
        pytest.skip("torch's products depend on the number of threads on this machine")
    assert torch.equal(bits(whole), bits(expected))
