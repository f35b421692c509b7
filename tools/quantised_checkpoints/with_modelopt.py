"""A checkpoint as NVIDIA ModelOpt exports it: FP8 and NVFP4 by layer, and the config in a file of its own."""

from importlib.metadata import version

import torch
from base import write
from modelopt.torch.quantization.qtensor import FP8QTensor, NVFP4QTensor
from torch import Tensor

LIBRARY = f"nvidia-modelopt {version('nvidia-modelopt')}"
FP8 = ("q_proj", "k_proj", "v_proj", "o_proj")


def quantise(module: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Attention in FP8, the rest in NVFP4."""
    if module.endswith(FP8):
        numbers, scale = FP8QTensor.quantize(weight)
        stored = numbers._quantized_data
        again = numbers.dequantize(torch.float32, scale=scale)
        tensors = {"weight": stored, "weight_scale": scale.float().reshape(()), "input_scale": torch.tensor(0.02)}
        if module.endswith(("k_proj", "v_proj")):
            tensors[module[-6] + "_scale"] = torch.tensor(0.25)
        return tensors, again
    numbers, scale, whole = NVFP4QTensor.quantize(weight, 16)
    again = numbers.dequantize(torch.float32, scale=scale, double_scale=whole, block_sizes={-1: 16})
    tensors = {"weight": numbers._quantized_data, "weight_scale": scale, "weight_scale_2": whole.float().reshape(())}
    return tensors | {"input_scale": torch.tensor(0.001)}, again


def main() -> None:
    """Write all."""
    layers = {f"model.layers.0.self_attn.{name}": {"quant_algo": "FP8"} for name in FP8}
    mlp = ("gate_proj", "up_proj", "down_proj")
    layers |= {f"model.layers.0.mlp.{name}": {"quant_algo": "NVFP4", "group_size": 16} for name in mlp}
    quantization = {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": "FP8", "quantized_layers": layers}
    quantization["exclude_modules"] = ["lm_head"]
    beside = {"producer": {"name": "modelopt", "version": version("nvidia-modelopt")}, "quantization": quantization}
    write("modelopt-mixed", LIBRARY, {}, quantise, beside=beside)


if __name__ == "__main__":
    main()
