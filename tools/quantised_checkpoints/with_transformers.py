"""FP8 checkpoints as DeepSeek, Qwen and AutoFP8 publish them; transformers dequantises."""

import torch
import transformers
from base import Quantise, write
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

LIBRARY = f"transformers {transformers.__version__}"
MOST = 448.0  # largest number of e4m3


def blocks_of(side: int, *, powers: bool) -> Quantise:
    """A scale per block of side x side. `powers`: scales are powers of two, stored as their exponents."""

    def quantise(module: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        scale = torch.stack(
            [torch.stack([tile.abs().max() for tile in band.split(side, 1)]) for band in weight.split(side)]
        )
        scale = scale / MOST
        if powers:
            scale = torch.exp2(torch.ceil(torch.log2(scale)))
        spread = scale.repeat_interleave(side, 0).repeat_interleave(side, 1)[: len(weight), : weight.shape[1]]
        numbers = (weight / spread).to(torch.float8_e4m3fn)
        stored = scale.to(torch.float8_e8m0fnu) if powers else scale
        return {"weight": numbers, "weight_scale_inv": stored}, again(numbers, stored)

    return quantise


def whole(module: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """One scale for the tensor, one for its input, and those of the cache."""
    scale = weight.abs().max() / MOST
    numbers = (weight / scale).to(torch.float8_e4m3fn)
    tensors = {"weight": numbers, "weight_scale": scale.reshape(()), "input_scale": torch.tensor(0.02)}
    if module.endswith(("k_proj", "v_proj")):
        tensors[module[-6] + "_scale"] = torch.tensor(0.5)
    return tensors, again(numbers, scale.reshape(1, 1))


def again(numbers: Tensor, scale: Tensor) -> Tensor:
    """Dequantised by transformers, in float32."""
    return Fp8Dequantize(None)._dequantize_one(numbers, scale, torch.float32)


def main() -> None:
    """Write all."""
    base = {"quant_method": "fp8", "fmt": "e4m3"}
    said = base | {"activation_scheme": "dynamic", "modules_to_not_convert": ["lm_head"]}
    write("fp8-block32", LIBRARY, said | {"weight_block_size": [32, 32]}, blocks_of(32, powers=False))
    said |= {"weight_block_size": [128, 128], "scale_fmt": "ue8m0"}
    write("fp8-block128", LIBRARY, said, blocks_of(128, powers=True))
    write("fp8-tensor", LIBRARY, base | {"activation_scheme": "static", "ignored_layers": ["lm_head"]}, whole)


if __name__ == "__main__":
    main()
