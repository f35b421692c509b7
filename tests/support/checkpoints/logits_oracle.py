"""What transformers says about a checkpoint, and what agreeing with it means."""

from collections.abc import Callable
from pathlib import Path

import torch


def assert_same_logits(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Per row max|a-b| <= 1e-4 * max|b|, and the same top token wherever its margin is above 1e-3."""
    assert ours.shape == theirs.shape
    assert torch.isfinite(ours).all()
    error = (ours - theirs).abs().amax(-1) / theirs.abs().amax(-1)
    assert error.max() <= 1e-4
    top = theirs.topk(2, dim=-1)
    clear = top.values[:, 0] - top.values[:, 1] > 1e-3
    assert torch.equal(ours.argmax(-1)[clear], top.indices[:, 0][clear])


def oracle(directory: Path) -> Callable[[list[int]], torch.Tensor]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")

    def logits(ids: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            result: torch.Tensor = model(torch.tensor([ids])).logits[0]
        return result

    return logits
