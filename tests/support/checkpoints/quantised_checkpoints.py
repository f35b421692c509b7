"""Quantised checkpoints that the formats' own libraries made (tools/quantised_checkpoints), and what they must give."""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

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


def as_fp8(directory: Path, quantised: Path, floats: Path, block: tuple[int, int] = (16, 32)) -> None:
    """Write a float checkpoint's layers in FP8 with a scale per block, and the dequantised numbers as floats."""
    high, wide = block
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
    stored, again = dict(tensors), dict(tensors)
    for name, weight in tensors.items():
        if weight.ndim != 2 or ".layers." not in name or "gate." in name:
            continue
        bands = [[tile.float().abs().max() for tile in band.split(wide, 1)] for band in weight.split(high)]
        scale = torch.tensor(bands) / 448
        spread = scale.repeat_interleave(high, 0).repeat_interleave(wide, 1)[: weight.shape[0], : weight.shape[1]]
        stored[name] = (weight.float() / spread).to(torch.float8_e4m3fn)
        stored[name + "_scale_inv"] = scale
        again[name] = stored[name].float() * spread
    config = json.loads((directory / "config.json").read_text())
    said = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": list(block)}
    for place, kept, more in ((quantised, stored, {"quantization_config": said}), (floats, again, {})):
        place.mkdir()
        for file in directory.glob("generation_config.json"):
            shutil.copy(file, place)
        save_file(kept, place / "model.safetensors")
        (place / "config.json").write_text(json.dumps(config | more))
