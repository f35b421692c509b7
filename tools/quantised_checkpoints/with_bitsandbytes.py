"""Checkpoints by bitsandbytes: NF4 with double quantisation, FP4 without, and LLM.int8()."""

import bitsandbytes
import torch
from base import Quantise, write
from bitsandbytes import functional
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from torch import Tensor

LIBRARY = f"bitsandbytes {bitsandbytes.__version__}"


def of_four_bits(kind: str, *, double: bool) -> Quantise:
    """Quantise by a table of 16 values."""

    def quantise(module: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        packed, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=double, quant_type=kind)
        said = state.as_dict(packed=True)
        magnitudes = state.absmax
        if double:
            magnitudes = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
        # The library's own function in torch: its native one for this CPU gives other numbers for some blocks.
        again = _dequantize_4bit_compute(packed.flatten(), magnitudes, state.code, 64, weight.shape, torch.float32)
        return {"weight": packed} | {f"weight.{role}": part for role, part in said.items()}, again

    return quantise


def of_eight_bits(module: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """LLM.int8(): a magnitude for each row."""
    numbers, magnitudes, _ = functional.int8_vectorwise_quant(weight.half())
    again = functional.int8_vectorwise_dequant(numbers, magnitudes)
    return {"weight": numbers, "SCB": magnitudes, "weight_format": torch.tensor(0, dtype=torch.uint8)}, again


def main() -> None:
    """Write all."""
    four = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}
    four |= {"bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": "uint8"}
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    write("bitsandbytes-nf4", LIBRARY, four | nf4, of_four_bits("nf4", double=True))
    fp4 = {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False}
    write("bitsandbytes-fp4", LIBRARY, four | fp4, of_four_bits("fp4", double=False))
    eight = {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False, "llm_int8_threshold": 6.0}
    write("bitsandbytes-int8", LIBRARY, eight, of_eight_bits)


if __name__ == "__main__":
    main()
