"""Checkpoints by compressed-tensors: each matrix of a group in another format."""

import compressed_tensors
import torch
from base import write
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.quantization.utils import calculate_qparams
from torch import Tensor

LIBRARY = f"compressed-tensors {compressed_tensors.__version__}"
AT = "model.layers.0."


def scale_of(weight: Tensor, args: QuantizationArgs) -> tuple[Tensor, Tensor]:
    """Scales and zero points from the least and largest number of each tensor, channel, group or block."""
    rows, columns = weight.shape
    if args.strategy == "tensor":
        parts = weight.reshape(1, 1, -1)
    elif args.strategy == "channel":
        parts = weight.reshape(rows, 1, columns)
    elif args.strategy == "block":
        high, wide = args.block_structure
        tiles = [[tile.flatten() for tile in band.split(wide, 1)] for band in weight.split(high)]
        lows = torch.stack([torch.stack([tile.min() for tile in band]) for band in tiles])
        highs = torch.stack([torch.stack([tile.max() for tile in band]) for band in tiles])
        return calculate_qparams(lows, highs, args)
    else:
        parts = weight.reshape(rows, -1, args.group_size)
    whole = torch.tensor([448.0 * 6.0]) / weight.abs().max() if args.strategy == "tensor_group" else None
    scale, zero = calculate_qparams(parts.amin(-1), parts.amax(-1), args, global_scale=whole)
    return (scale.reshape(1), zero.reshape(1)) if args.strategy == "tensor" else (scale, zero)


def checkpoint(name: str, groups: dict[str, dict[str, object]], ignore: list[str], **more: object) -> None:
    """`groups`: as in a config's `config_groups`."""
    schemes = {key: QuantizationScheme(**group) for key, group in groups.items()}

    def quantise(module: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        if any(module.endswith(tail) for tail in ignore):
            return {"weight": weight.bfloat16()}, weight.bfloat16().float()
        found = next(s for s in schemes.values() if any(t == "Linear" or module.endswith(t[6:]) for t in s.targets))
        args = found.weights
        scale, zero = scale_of(weight, args)
        state = {"weight": weight, "weight_scale": scale.to(torch.bfloat16), "weight_zero_point": zero}
        if "nvfp4" in found.format or "mx" in found.format:
            state["weight_scale"] = scale.float()
        if "nvfp4" in found.format:
            state["weight_global_scale"] = torch.tensor([448.0 * 6.0]) / weight.abs().max()
        compressor = BaseCompressor.get_value_from_registry(found.format)
        packed = compressor.compress(state, found)
        wide = {key: part.float() if part.dtype == torch.bfloat16 else part for key, part in packed.items()}
        if "nvfp4" in found.format:  # its decompressor rounds to bfloat16 on the way; the same functions in float32
            numbers = unpack_fp4_from_uint8(packed["weight_packed"], *weight.shape, dtype=torch.float32)
            whole = packed["weight_global_scale"]
            again = dequantize(numbers, packed["weight_scale"].float(), None, args, torch.float32, global_scale=whole)
        else:
            again = compressor.decompress(wide, found)["weight"]
        if args.symmetric:
            packed.pop("weight_zero_point", None)
        return packed, again.float()

    config = {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision" if len({g["format"] for g in groups.values()}) > 1 else groups["group_0"]["format"],
        "config_groups": groups,
        "ignore": ["lm_head", *(f"re:.*{tail}" for tail in ignore)],
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "version": compressed_tensors.__version__,
        **more,
    }
    write(name, LIBRARY, config, quantise)


def group(target: str, format_: str, rounds: dict[str, object] | None = None, **weights: object) -> dict[str, object]:
    """A group of one target."""
    return {"targets": [target], "format": format_, "weights": weights, "input_activations": rounds}


def main() -> None:
    """Write all."""
    int4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
    token = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
    proj = r"re:.*\."
    checkpoint(
        "compressed-int",
        {
            "group_0": group(proj + "q_proj", "pack-quantized", **int4, symmetric=True),
            "group_1": group(proj + "k_proj", "pack-quantized", **int4, symmetric=False),
            "group_2": group(
                proj + "v_proj", "pack-quantized", num_bits=8, type="int", strategy="channel", symmetric=False
            ),
            "group_3": group(
                proj + "gate_proj", "int-quantized", token | {"type": "int"}, num_bits=8, type="int", strategy="channel"
            ),
            "group_4": group(
                proj + "up_proj", "int-quantized", num_bits=8, type="int", strategy="channel", symmetric=False
            ),
            "group_5": group(proj + "down_proj", "pack-quantized", num_bits=3, type="int", strategy="channel"),
        },
        ["o_proj"],
    )
    float8 = {"num_bits": 8, "type": "float"}
    checkpoint(
        "compressed-float",
        {
            "group_0": group(proj + "q_proj", "float-quantized", token, **float8, strategy="channel"),
            "group_1": group(proj + "k_proj", "float-quantized", **float8, strategy="tensor"),
            "group_2": group(proj + "v_proj", "naive-quantized", **float8, strategy="tensor"),
            "group_3": group(proj + "o_proj", "nvfp4-pack-quantized", **nvfp4()),
            "group_4": group(
                proj + "gate_proj", "float-quantized", **float8, strategy="block", block_structure=[64, 64]
            ),
            "group_5": group(
                proj + "up_proj", "mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32
            ),
            "group_6": group(
                proj + "down_proj", "float-quantized", **float8, strategy="block", block_structure=[64, 64]
            ),
        },
        [],
        kv_cache_scheme={"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True},
    )
    checkpoint(
        "compressed-w4a16",
        {"group_0": {**group("", "pack-quantized", **int4, actorder="weight"), "targets": ["Linear"]}},
        [],
    )


def nvfp4() -> dict[str, object]:
    """Settings of NVFP4's weights."""
    return {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}


if __name__ == "__main__":
    main()
