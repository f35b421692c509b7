"""Checkpoints by AutoRound: its own form with unlike settings of a layer, and GPTQ's."""

import auto_round
import torch
from auto_round_extension.torch.qlinear_torch import QuantLinear as OwnLinear
from auto_round_extension.torch.qlinear_torch_zp import QuantLinear as GptqLinear
from base import Quantise, write
from torch import Tensor

LIBRARY = f"auto-round {auto_round.__version__}"
GROUP = 32


def by(kind: type[torch.nn.Module], bits_of: dict[str, int], *, symmetric: bool) -> Quantise:
    """Quantise with a kind of the library's linears; modules of 16 bits stay as they are."""

    def quantise(module: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        rows, columns = weight.shape
        bits = bits_of.get(module.rpartition(".")[2], 4)
        if bits == 16:
            return {"weight": weight.half()}, weight.half().float()
        groups, most = weight.reshape(rows, -1, GROUP), (1 << bits) - 1
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scale = ((high - low) / most).half().float()
        zeros: Tensor | int = (-low / scale).round().clamp(0, most)
        if symmetric:
            scale, zeros = (2 * groups.abs().amax(-1) / most).half().float(), (most + 1) // 2
        linear = torch.nn.Linear(columns, rows, bias=False)
        linear.weight.data = weight
        packed = kind(bits, GROUP, columns, rows, False)
        packed.device = "cpu"
        packed.pack(linear, scale, zeros, None)
        packed.post_init()
        tensors = {name: getattr(packed, name) for name in ("qweight", "qzeros", "scales")}
        packed.scales = packed.scales.float()  # it dequantises in the scales' dtype
        again = packed.float().forward(torch.eye(columns)).t()
        return tensors, again.float()

    return quantise


def main() -> None:
    """Write all."""
    base = {"quant_method": "auto-round", "bits": 4, "group_size": GROUP, "data_type": "int", "iters": 200}
    base |= {"autoround_version": auto_round.__version__, "block_name_to_quantize": "model.layers"}
    widths = {"q_proj": 8, "o_proj": 16, "down_proj": 2}
    extra = {f"model.layers.0.self_attn.{name}": {"bits": widths[name]} for name in ("q_proj", "o_proj")}
    said = base | {"sym": False, "packing_format": "auto_round", "extra_config": extra | {".*down_proj.*": {"bits": 2}}}
    write("auto-round-own", LIBRARY, said, by(OwnLinear, widths, symmetric=False), dtype=torch.float16)
    said = base | {"sym": True, "packing_format": "auto_round:auto_gptq"}
    write("auto-round-gptq", LIBRARY, said, by(GptqLinear, {}, symmetric=True), dtype=torch.float16)


if __name__ == "__main__":
    main()
