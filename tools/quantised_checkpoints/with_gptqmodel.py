"""Checkpoints by GPTQModel: GPTQ of both versions, several widths and orders of columns; AWQ."""

import gptqmodel
import torch
from base import Quantise, write
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from torch import Tensor

LIBRARY = f"GPTQModel {gptqmodel.__version__}"
GROUP = 32


def steps(weight: Tensor, bits: int, *, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale (float16 numbers) and zero point of each row of a group of columns."""
    most = (1 << bits) - 1
    if symmetric:
        scale = (2 * weight.abs().amax(-1) / most).half().float()
        return scale, torch.full_like(scale, (most + 1) // 2)
    low, high = weight.amin(-1).clamp(max=0), weight.amax(-1).clamp(min=0)
    scale = ((high - low) / most).half().float()
    return scale, (-low / scale).round().clamp(0, most)


def gptq(bits_of: dict[str, int], *, symmetric: bool, shuffled: bool, offset: int) -> Quantise:
    """`shuffled`: columns of a group are not neighbours, as with `desc_act`. `offset`: subtracted from zero points."""

    def quantise(module: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        rows, columns = weight.shape
        bits = bits_of.get(module.rpartition(".")[2], 4)
        index = torch.arange(columns) // GROUP
        if shuffled:
            index = index[torch.randperm(columns, generator=torch.Generator().manual_seed(5))]
        parts = [steps(weight[:, index == g], bits, symmetric=symmetric) for g in range(columns // GROUP)]
        scales, zeros = (torch.stack(each, 1) for each in zip(*parts, strict=True))
        linear = torch.nn.Linear(columns, rows, bias=False)
        linear.weight.data = weight
        packed = TorchLinear(bits, GROUP, symmetric, shuffled, columns, rows)
        packed.pack_original(linear, scales, zeros, index.int())
        packed.post_init()
        again = packed.float().dequantize_weight().t()
        names = ("qweight", "qzeros", "scales", "g_idx")
        tensors = {name: getattr(packed, name) for name in names}
        tensors["scales"] = tensors["scales"].half()
        if offset:  # the first version's zero points, each stored minus one in its bits
            tensors["qzeros"] = minus_one(tensors["qzeros"], bits)
        return tensors, again.float()

    return quantise


def minus_one(words: Tensor, bits: int) -> Tensor:
    """Subtract 1 from each number of rows of packed words."""
    rows, out = words.shape[0], []
    for row in words.tolist():
        stream = sum((word & 0xFFFFFFFF) << 32 * at for at, word in enumerate(row))
        numbers = [(stream >> bits * at & (1 << bits) - 1) - 1 & (1 << bits) - 1 for at in range(32 * len(row) // bits)]
        stream = sum(number << bits * at for at, number in enumerate(numbers))
        found = [stream >> 32 * at & 0xFFFFFFFF for at in range(len(row))]
        out.append([word - (1 << 32) if word >> 31 else word for word in found])
    return torch.tensor(out, dtype=torch.int32).reshape(rows, -1)


def awq(module: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """AWQ's gemm form, packed in its order; the library unpacks."""
    parts = [steps(part, 4, symmetric=False) for part in weight.split(GROUP, 1)]
    scales, zeros = (torch.stack(each) for each in zip(*parts, strict=True))  # [groups, rows]
    spread = scales.repeat_interleave(GROUP, 0), zeros.repeat_interleave(GROUP, 0)
    numbers = (weight.t() / spread[0] + spread[1]).round().clamp(0, 15).int()

    def packed(values: Tensor) -> Tensor:
        eights = values.int().contiguous().reshape(len(values), -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]]
        words = sum(eights[:, :, at].long() << 4 * at for at in range(8))
        return torch.where(words >= 1 << 31, words - (1 << 32), words).int().contiguous()

    tensors = {"qweight": packed(numbers), "qzeros": packed(zeros), "scales": scales.half()}
    again = dequantize_gemm(tensors["qweight"], tensors["qzeros"], scales, 4, GROUP)
    return tensors, again.t().float()


def main() -> None:
    """Write all."""
    base = {"bits": 4, "group_size": GROUP, "damp_percent": 0.05, "true_sequential": True, "quant_method": "gptq"}
    base |= {"lm_head": False, "pack_dtype": "int32", "static_groups": False, "meta": {"quantizer": ["gptqmodel:7"]}}
    widths = {"q_proj": 2, "k_proj": 3, "v_proj": 8}
    dynamic = {rf"+:.*\.{name}": {"bits": bits} for name, bits in widths.items()}
    first = gptq(widths, symmetric=False, shuffled=True, offset=1)
    said = base | {"desc_act": True, "sym": False, "checkpoint_format": "gptq", "dynamic": dynamic}
    write("gptq-first", LIBRARY, said, first, dtype=torch.float16)
    second = gptq({"o_proj": 3}, symmetric=True, shuffled=False, offset=0)
    said = base | {"desc_act": False, "sym": True, "checkpoint_format": "gptq_v2"}
    write("gptq-second", LIBRARY, said | {"dynamic": {r".*o_proj": {"bits": 3}}}, second, dtype=torch.float16)
    said = {"bits": 4, "group_size": GROUP, "quant_method": "awq", "version": "gemm", "zero_point": True}
    write("awq", LIBRARY, said | {"modules_to_not_convert": None}, awq, dtype=torch.float16)


if __name__ == "__main__":
    main()
