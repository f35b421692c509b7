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
    said = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": list(block)}
    _write_both(directory, (quantised, stored, {"quantization_config": said}), (floats, again, {}))


def as_mxfp4(directory: Path, quantised: Path, floats: Path) -> None:
    """Write a float gpt-oss with experts in MXFP4, as the releases have it, and what transformers decodes of that."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    tensors = load_file(directory / "model.safetensors")
    stored, again = dict(tensors), dict(tensors)
    steps = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    for name, weight in tensors.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            continue
        groups = weight.float().transpose(1, 2).unflatten(2, (-1, 32))  # [experts, rows, groups, 32]
        exponents = (groups.abs().amax(-1) / 6).clamp(min=1e-30).log2().ceil()
        near = (groups.abs() / exponents.exp2().unsqueeze(-1)).unsqueeze(-1).sub(steps).abs().argmin(-1)
        codes = near + 8 * (groups < 0)
        stored[name + "_blocks"] = (codes[..., ::2] + 16 * codes[..., 1::2]).to(torch.uint8)
        stored[name + "_scales"] = (exponents + 127).to(torch.uint8)
        del stored[name]
        decoded = convert_moe_packed_tensors(stored[name + "_blocks"], stored[name + "_scales"], dtype=torch.float32)
        again[name] = decoded.contiguous()
    said = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    _write_both(directory, (quantised, stored, {"quantization_config": said}), (floats, again, {}))


def _write_both(directory: Path, *checkpoints: tuple[Path, dict[str, torch.Tensor], dict[str, object]]) -> None:
    """Write checkpoints, each of a place, tensors, and more of the config, beside the original's other files."""
    config = json.loads((directory / "config.json").read_text())
    for place, kept, more in checkpoints:
        place.mkdir()
        for file in directory.glob("generation_config.json"):
            shutil.copy(file, place)
        save_file(kept, place / "model.safetensors")
        (place / "config.json").write_text(json.dumps(config | more))
