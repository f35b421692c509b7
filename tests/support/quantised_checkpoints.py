"""Quantised checkpoints that the formats' own libraries made (tools/quantised_checkpoints), and what they must give."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch

PLACE = Path(__file__).parent / "quantised"
NAMES = sorted(place.name for place in PLACE.iterdir() if place.is_dir())


@dataclass(frozen=True)
class Expected:
    """Reference values of a checkpoint; `library` names what dequantised it, transformers computed over that."""

    library: str
    prompt: list[int]
    tokens: list[int]  # greedy, after the prompt
    logits: list[float]  # of the prompt's last row
    digests: dict[str, str]  # of the dequantised matrices


def expected(name: str) -> Expected:
    return Expected(**json.loads((PLACE / name / "expected.json").read_text()))


def digest(matrix: torch.Tensor) -> str:
    """Digest of a matrix's float32 numbers; both zeros count as one."""
    numbers = matrix.float().contiguous() + 0.0
    return hashlib.blake2b(numbers.numpy().tobytes(), digest_size=16).hexdigest()
